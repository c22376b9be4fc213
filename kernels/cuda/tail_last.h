// The last of two layers, in the registers of a warpgroup that has the first one's sums: a 3×3 convolution to a few
// channels of pixels that are twice as many to each side as the cells, 2×2 to a cell.
//
// A band is what a warpgroup has at a time, 64 cells: strips of 16, one a warp, kStrips to a row. What cells give to
// those beside them is exchanged between lanes, and from strip to strip, as from row to row, through shared memory.
#pragma once

#include <type_traits>

#include "tail_output.h"
#include "turns.h"

namespace fastinv {

namespace tail {

constexpr int kBetween = 64, kMostOutputs = 4;
constexpr int kTeams = 2, kThreads = kTeams * kTeam;  // warpgroups and their threads
constexpr int kRow = 128;                             // bytes: of a row that tensor cores read
constexpr int kStrip = 16;                            // cells
constexpr int kGiven = 32, kAcross = 16;              // columns of the second product: within a row, and to others
constexpr int kLast = (kGiven + kAcross) * kRow;      // bytes of a phase
constexpr int kLastBytes = 4 * kLast;

// Columns of the second product, in eights; 4 · q + o is output o at parity q. Of the first four q is the row's, of
// the others the column's.
enum Column {
  kLeft,     // the right column of the cell to the left
  kEven,     // this cell's left column
  kOdd,      // and its right one
  kRight,    // the left column of the cell to the right
  kBeside,   // the row of cells above (phases of even rows) or below, straight
  kAcrossly  // and across: the left column of the cell to the right, the right column of the one to the left
};

// Both layers' biases, one behind the other.
template <class Thread>
FASTINV_BLOCK void share_biases(const Tail& p, const Thread& self, int threads, float* to) {
  share_bias<kBetween>(self, threads, to, p.bias, kBetween);
  share_bias<kMostOutputs>(self, threads, to + kBetween, p.last_bias, p.outputs);
}

// What a strip gives to those beside it: of its own row, and of the rows above and below.
enum class Beside { kOwn, kAbove, kBelow };
constexpr int kBesideKinds = 3;

template <class Type, int kStrips, class Thread>
class LastLayer {
 public:
  static constexpr int kSide = kStrips * kStrip, kBand = 4 / kStrips;  // cells across, and rows of them in a band
  static constexpr int kRowSent = kSide * 8;  // floats that a row gives to the one above, or below
  static constexpr int kSent = (2 * kBand + 1) * kRowSent;
  static constexpr int kWaiting = 8 * kWarp * kStrips;                // floats of a row that waits for the one below
  static constexpr int kSides = kStrips > 1 ? 64 * kBesideKinds : 0;  // floats that strips give to those beside them
  static constexpr int kFloats = kSent + kWaiting + kSides;           // of a warpgroup, in shared memory

  // Args:
  //   bands: of an image.
  //   last, bias, last_bias: in shared memory; `own`: kFloats there.
  FASTINV_BLOCK LastLayer(const Tail& p, Thread& self, int bands, const unsigned char* last, const float* bias,
                          const float* last_bias, float* own)
      : p_(p),
        self_(self),
        bands_(bands),
        team_(self.index() / kTeam),
        warp_(self.index() % kTeam / kWarp),
        lane_(self.index() % kWarp),
        last_(last),
        bias_(bias),
        last_bias_(last_bias),
        up_(own),
        down_(up_ + kBand * kRowSent) {}

  // Of the first layer's `sums_`; leaves in `own_` what is this row's, in shared memory what goes up and down.
  // `meanwhile` is called when all products are done; where there are several strips, the warpgroup waits for each
  // other there.
  template <class F>
  FASTINV_BLOCK void give(int band, F&& meanwhile) {
    float given[2][4 * kGiven / 8], above[4 * kAcross / 8], below[4 * kAcross / 8];
    const Right last(last_);
    uint32_t left[4][4][4];
    if (p_.slope == 0.0f) {
      activate(left, [](float low, float high) { return pack_relu(Type{}, low, high); });
    } else {
      activate(left, [&](float low, float high) {
        return pack(Type{}, low < 0.0f ? p_.slope * low : low, high < 0.0f ? p_.slope * high : high);
      });
    }
    self_.begin_products();  // two sums in turn: a product waits for the one before it
#pragma unroll
    for (int phase = 0; phase < 4; ++phase) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Right weights = last + (phase * kLast + k * 32);
        self_.product(Type{}, given[phase % 2], left[phase][k], weights, phase / 2 + k > 0);
        self_.product(Type{}, phase < 2 ? above : below, left[phase][k], weights + kGiven * kRow, phase % 2 + k > 0);
      }
    }
    self_.end_products();
    self_.take_products(given, above, below);
#pragma unroll
    for (int i = 0; i < 4 * kGiven / 8; ++i) given[0][i] += given[1][i];
    if constexpr (kStrips > 1) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        show(Beside::kOwn, e, given[0][4 * kLeft + e], given[0][4 * kRight + 2 + e]);
        show(Beside::kAbove, e, above[4 + e], above[6 + e]);
        show(Beside::kBelow, e, below[4 + e], below[6 + e]);
      }
    }
    meanwhile();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float to_left[2], to_right[2];
      from_right(given[0][4 * kLeft + e], given[0][4 * kLeft + 2 + e], Beside::kOwn, e, to_left);
      from_left(given[0][4 * kRight + e], given[0][4 * kRight + 2 + e], Beside::kOwn, e, to_right);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        own_[value(e, h, 0)] = given[0][4 * kEven + 2 * h + e] + to_right[h];
        own_[value(e, h, 1)] = given[0][4 * kOdd + 2 * h + e] + to_left[h];
      }
      send(above, Beside::kAbove, e, up_ + line() * kRowSent);
      send(below, Beside::kBelow, e, down_ + (line() < kBand - 1 ? line() : kBand - 1 + band % 2) * kRowSent);
    }
  }

  // Adds what came from above and below, and stores what is complete. Lanes have even rows of pixels where lane % 4 <
  // 2, for which the row of cells above counts, and odd ones, for which that below does: those of a band's last line
  // wait for the next band, which stores them with its own, in one go. `down_` is what the rows above sent; what a
  // band's last row did has a place that changes, for the next band.
  FASTINV_BLOCK void take(int n, int band) {
    const bool odd = lane_ % 4 >= 2, last = line() == kBand - 1, late = odd && last;
    const int row = band * kBand + line();
    const float* above = down_ + (line() > 0 ? line() - 1 : kBand - 1 + (band + 1) % 2) * kRowSent;
    const float* below = up_ + (last ? 0 : line() + 1) * kRowSent;
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = own_[i];
    if (late) {
      float* waiting = up_ + kSent + strip() * 8 * kWarp + lane_;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = waiting[i * kWarp];
        waiting[i * kWarp] = own_[i];
      }
    }
    put_row(n, late ? row - kBand : row, values, odd ? below : row == 0 ? nullptr : above, !late || band > 0);
    if (band + 1 == bands_) put_row(n, row, own_, nullptr, late);
  }

 protected:
  const Tail& p_;
  Thread& self_;
  const int bands_;
  const int team_, warp_, lane_;
  float sums_[4][kBetween / 2];  // of the first layer, [phase]

 private:
  FASTINV_BLOCK int strip() const { return warp_ % kStrips; }
  FASTINV_BLOCK int line() const { return warp_ / kStrips; }  // of a band

  // The sums, with the bias, as left factors: two at a time through `activation`.
  template <class F>
  FASTINV_BLOCK void activate(uint32_t (&left)[4][4][4], F&& activation) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* bias = bias_ + 8 * j + lane_ % 4 * 2;
      const float b0 = bias[0], b1 = bias[1];
#pragma unroll
      for (int phase = 0; phase < 4; ++phase) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float* sum = sums_[phase] + 4 * j + 2 * h;
          left[phase][j / 2][j % 2 * 2 + h] = activation(sum[0] + b0, sum[1] + b1);
        }
      }
    }
  }

  // Of cells' values, those of rows lane / 4 and lane / 4 + 8, the neighbours'; 0 outside the image.
  FASTINV_BLOCK void from_right(float low, float high, Beside kind, int e, float (&found)[2]) const {
    const int lane = (lane_ + 4) % kWarp;
    const float next_low = self_.shuffle(low, lane), next_high = self_.shuffle(high, lane);
    const bool edge = lane_ >= kWarp - 4;
    found[0] = edge ? next_high : next_low;
    found[1] = edge ? 0.0f : next_high;
    if (kStrips > 1 && edge && strip() + 1 < kStrips) found[1] = *shown(warp_ + 1, 0, kind, e);
  }
  FASTINV_BLOCK void from_left(float low, float high, Beside kind, int e, float (&found)[2]) const {
    const int lane = (lane_ + kWarp - 4) % kWarp;
    const float next_low = self_.shuffle(low, lane), next_high = self_.shuffle(high, lane);
    const bool edge = lane_ < 4;
    found[0] = edge ? 0.0f : next_low;
    found[1] = edge ? next_low : next_high;
    if (kStrips > 1 && edge && strip() > 0) found[0] = *shown(warp_ - 1, 1, kind, e);
  }

  // Where a warp's first cell leaves what it gives to the left (side 0), its last what it gives to the right.
  FASTINV_BLOCK float* shown(int warp, int side, Beside kind, int e) const {
    float* sides = up_ + kSent + kWaiting;
    return sides + ((warp * 2 + side) * kBesideKinds + static_cast<int>(kind)) * 8 + lane_ % 4 * 2 + e;
  }
  FASTINV_BLOCK void show(Beside kind, int e, float first, float last) const {
    if (lane_ < 4) *shown(warp_, 0, kind, e) = first;
    if (lane_ >= kWarp - 4) *shown(warp_, 1, kind, e) = last;
  }

  // Gives [cell, column parity · 4 + output] of this row to the one above or below.
  FASTINV_BLOCK void send(const float (&given)[8], Beside kind, int e, float* row) const {
    float right[2], left[2];
    float* to = row + strip() * kStrip * 8;
    from_right(given[4 + e], given[6 + e], kind, e, right);
    from_left(given[4 + e], given[6 + e], kind, e, left);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float across = lane_ % 4 < 2 ? left[h] : right[h];
      to[(lane_ / 4 + 8 * h) * 8 + lane_ % 4 * 2 + e] = given[2 * h + e] + across;
    }
  }

  // Of a thread's eight values that of output lane % 2 · 2 + e, the cell lane / 4 + 8 · h, and a column's parity.
  FASTINV_BLOCK static constexpr int value(int e, int h, int parity) { return 4 * e + 2 * h + parity; }

  FASTINV_BLOCK void put_row(int n, int row, const float (&own)[8], const float* other, bool complete) const {
    if (!complete) return;
    const int first = lane_ % 2 * 2;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = own[i] + last_bias_[first + i / 4];
    if (other != nullptr) {
      other += (strip() * kStrip + lane_ / 4) * 8 + first;
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += other[i / 2 % 2 * 64 + i % 2 * 4 + i / 4];
    }
    finish(p_, x);
    const int64_t line = int64_t{n} * p_.out_n + int64_t{2 * row + lane_ % 4 / 2} * p_.out_y;
    with_result(p_, [&](auto* out, auto both_of) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first + e >= p_.outputs) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          auto* at = out + line + int64_t{first + e} * p_.out_c +
                     int64_t{(strip() * kStrip + lane_ / 4) * 2 + 16 * h} * p_.out_x;
          const auto both = both_of(x[value(e, h, 0)], x[value(e, h, 1)]);
          if (p_.out_x == 1) {  // then rows and images are of an even number
            *reinterpret_cast<std::remove_const_t<decltype(both)>*>(at) = both;
          } else {
            at[0] = both.at[0];
            at[p_.out_x] = both.at[1];
          }
        }
      }
    });
  }

  const unsigned char* last_;
  const float *bias_, *last_bias_;
  float *up_, *down_;
  float own_[8];
};

}  // namespace tail

}  // namespace fastinv
