// The last two layers of a decoder in one launch: a transposed convolution that doubles 16×16 pixels (3×3, stride 2),
// an activation, and a 3×3 convolution to a few channels. What lies between them never leaves the registers.
//
// As in `kernels/triton/pair.py` both are on one grid of cells, the input's pixels: a cell has 2×2 pixels of the first
// layer, one of each phase (row parity · 2 + column parity), and 2×2 of the second. A persistent block keeps all
// weights in shared memory. Its two warpgroups go their own ways, so that one multiplies while the other does all else:
// each takes image after image, 4 rows of cells at a time, the next 4 on their way in registers meanwhile. A warp has a
// row of 16 cells:
//
//   1. sums[phase] [16 cells, kBetween] = Σ x[cell + shift] · first[shift, phase] over shifts of 0 or 1 down and right.
//   2. Activated, they are the left factors of what each phase gives to the pixels around it: [16, kBetween] ·
//      last[phase], whose columns are outputs of this cell or of a neighbour; see `Column`.
//   3. What goes to the left and right is exchanged between lanes, what goes up and down through shared memory.
//
// For 64 cells these are 9 · 2 products of 64×64×64 and 4 of 64×48×64: 37.7 and 6.3 MFLOP an image, where the direct
// form has 37.7 and 3.5. At 4,096 FLOPs a cycle they take 10,700 cycles of a multiprocessor. With the warpgroups in
// step the tensor cores were busy 46% of the time on an H100.
#pragma once

#include <type_traits>

#include "tail_output.h"
#include "warpgroup.h"

namespace fastinv {

namespace tail {

constexpr int kInputs = 128, kBetween = 64, kMostOutputs = 4;
constexpr int kSide = 16, kBand = 4, kBands = kSide / kBand;                 // rows of cells: of an image, at a time
constexpr int kTeams = 2, kTeam = kBand * kWarp, kThreads = kTeams * kTeam;  // warpgroups and their threads
constexpr int kRow = 128;                                                    // bytes: of a row that tensor cores read
constexpr int kPixel = 2 * kInputs;                                          // bytes
constexpr int kAtOnce = 2;                        // 16s of channels of which a thread has fragments
constexpr int kFirst = kBetween * kPixel;         // bytes of a shift and a phase
constexpr int kGiven = 32, kAcross = 16;          // columns of the second product: within a row, and to others
constexpr int kLast = (kGiven + kAcross) * kRow;  // bytes of a phase
constexpr int kFirstBytes = 9 * kFirst, kLastBytes = 4 * kLast;
constexpr int kCells = (kBand + 1) * kSide * kPixel;  // bytes of the rows, and of the one after them
constexpr int kRowSent = kSide * 8;                   // floats that a row of cells gives to the one above, or below
constexpr int kSent = (2 * kBand + 1) * kRowSent;
constexpr int kWaiting = 8 * kWarp;  // floats of a row that waits for the one below
constexpr int kShared =
    kFirstBytes + kLastBytes + kPixel + 4 * (kBetween + kMostOutputs) + kTeams * (kCells + 4 * (kSent + kWaiting));

// Whether phase `phase` reads pixels at this shift (row · 2 + column), and the number of the two among all that do.
FASTINV_BOTH constexpr bool reads(int phase, int shift) { return (phase & shift) == shift; }
FASTINV_BOTH constexpr int place(int phase, int shift) {
  return shift == 0 ? phase : shift == 1 ? 4 + phase / 2 : shift == 2 ? 4 + phase : 8;
}

// Columns of the second product, in eights; 4 · q + o is output o at parity q. Of the first four q is the row's, of
// the others the column's.
enum Column {
  kLeft,     // the right column of the cell to the left
  kEven,     // this cell's left column
  kOdd,      // and its right one
  kRight,    // the left column of the cell to the right
  kBeside,   // the row of cells above (phases of even rows) or below, straight
  kAcrossly  // and across: the right column of the cell to the left, the left column of the one to the right
};

// Eight pixels' worth of eight channels on their way.
struct Chunk {
  Words words[8];
};

// What a thread does. All is in the order of the steps above.
template <class Type, bool kChannelsLast, class Thread>
class Worker {
 public:
  FASTINV_BLOCK Worker(const Tail& p, Thread& self, unsigned char* shared)
      : p_(p),
        self_(self),
        team_(self.index() / kTeam),
        warp_(self.index() % kTeam / kWarp),
        lane_(self.index() % kWarp),
        first_(shared),
        last_(first_ + kFirstBytes),
        zeros_(last_ + kLastBytes),
        bias_(reinterpret_cast<float*>(zeros_ + kPixel)),
        last_bias_(bias_ + kBetween),
        cells_(reinterpret_cast<unsigned char*>(last_bias_ + kMostOutputs) + team_ * kCells),
        up_(reinterpret_cast<float*>(cells_ + (kTeams - team_) * kCells) + team_ * (kSent + kWaiting)),
        down_(up_ + kBand * kRowSent) {}

  // A warpgroup takes every (blocks · kTeams)-th image.
  FASTINV_BLOCK void run(int block, int blocks) {
    const int step = blocks * kTeams;
    int n = block * kTeams + team_;
    begin();
    self_.sync();
    if (n >= p_.images) return;
    Chunk chunk;
    if (group() / 2 == kBand - 1) {
      fetch<0, 8>(row_of(n, 0), chunk);
      put_at(0, chunk);
    }
    fetch<0, 8>(after(n, n + step, 0), chunk);
    for (; n < p_.images; n += step) {
#pragma unroll 1
      for (int band = 0; band < kBands; ++band) {
        put_at(place_of(1 + group() / 2, band), chunk);
        self_.sync(team_);
        const bool ends = band + 1 == kBands;
        const unsigned char* next = ends ? after(n + step, n + 2 * step, 0) : after(n, n + step, band + 1);
        fetch<0, kEarly>(next, chunk);
        ask_for(next);  // the rest: there are no registers for it yet
        multiply(band);
        fetch<kEarly, 8>(next, chunk);
        give(band);
        self_.sync(team_);
        take(n, band);
      }
    }
  }

 private:
  // ---- the input: a thread brings 8 channels of half a row of cells ------------------------------------------------

  FASTINV_BLOCK int octet() const { return lane_ % 8 + 8 * (warp_ % 2); }
  FASTINV_BLOCK int group() const { return warp_ / 2 * 4 + lane_ / 8; }

  // Where what a thread brings of a row begins, and bytes from one of its eight pieces to the next.
  FASTINV_BLOCK const unsigned char* row_of(int n, int row) const {
    const int column = group() % 2 * 8;
    const int64_t at = kChannelsLast ? ((int64_t{n} * kSide + row) * kSide + column) * kInputs + octet() * 8
                                     : ((int64_t{n} * kInputs + octet() * 8) * kSide + row) * kSide + column;
    return static_cast<const unsigned char*>(p_.x) + 2 * at;
  }
  static constexpr int kPiece = kChannelsLast ? kPixel : 2 * kSide * kSide;
  static constexpr int kEarly = kChannelsLast ? 0 : 4;  // pieces that are on their way during the first layer

  // The same of the rows after the first of a band, and of the first of the next: after the last band, of the image
  // `next`. Null where there is none.
  FASTINV_BLOCK const unsigned char* after(int n, int next, int band) const {
    const int row = band * kBand + 1 + group() / 2;
    if (n < p_.images && row < kSide) return row_of(n, row);
    return next < p_.images && row == kSide ? row_of(next, 0) : nullptr;
  }
  template <int kBegin, int kEnd>
  FASTINV_BLOCK void fetch(const unsigned char* row, Chunk& chunk) const {
    if (row == nullptr) return;
#pragma unroll
    for (int i = kBegin; i < kEnd; ++i) chunk.words[i] = *reinterpret_cast<const Words*>(row + i * kPiece);
  }

  FASTINV_BLOCK void ask_for(const unsigned char* row) const {
    if (row == nullptr) return;
#pragma unroll
    for (int i = kEarly; i < 8; ++i) self_.ask_for(row + i * kPiece);
  }

  FASTINV_BLOCK void check(const Chunk& chunk) const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) largest = larger_halves(largest, chunk.words[i].at[k] & 0x7fff7fffu);
    }
    if ((largest & 0xffffu) >= Type::kInfinity || largest >> 16 >= Type::kInfinity) *p_.flag = 1;
  }

  // Where row `row` of a band lies. The row after a band, the next one's first, stays where it is: at one end, then at
  // the other.
  FASTINV_BLOCK static int place_of(int row, int band) { return band % 2 == 0 || row % kBand != 0 ? row : kBand - row; }

  FASTINV_BLOCK void put_at(int place, const Chunk& chunk) {
    if (!kChannelsLast && p_.flag != nullptr) check(chunk);  // here, where the values have to be there
    unsigned char* row = cells_ + (place * kSide + group() % 2 * 8) * kPixel;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      Words pixel;
      if constexpr (kChannelsLast) {
        pixel = chunk.words[i];
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          pixel.at[k] = halves(chunk.words[2 * k].at[i / 2], chunk.words[2 * k + 1].at[i / 2], i % 2);
        }
      }
      *reinterpret_cast<Words*>(row + i * kPixel + (octet() ^ i) * 16) = pixel;
    }
  }

  // What all share.
  FASTINV_BLOCK void begin() {
    const int thread = self_.index();
    const auto copy = [&](unsigned char* to, const void* from, int bytes) {
      for (int i = 16 * thread; i < bytes; i += 16 * kThreads) {
        *reinterpret_cast<Words*>(to + i) =
            *reinterpret_cast<const Words*>(static_cast<const unsigned char*>(from) + i);
      }
    };
    copy(first_, p_.first, kFirstBytes);
    copy(last_, p_.last, kLastBytes);
    for (int i = thread; i < kPixel / 4; i += kThreads) reinterpret_cast<uint32_t*>(zeros_)[i] = 0;
    for (int i = thread; i < kBetween; i += kThreads) bias_[i] = p_.bias == nullptr ? 0.0f : p_.bias[i];
    if (thread < kMostOutputs) {
      last_bias_[thread] = p_.last_bias == nullptr || thread >= p_.outputs ? 0.0f : p_.last_bias[thread];
    }
    self_.publish();
  }

  // ---- the first layer ---------------------------------------------------------------------------------------------

  FASTINV_BLOCK void multiply(int band) {
    const Right first(first_);
    uint32_t left[2][kAtOnce][4];
#pragma unroll
    for (int shift = 0; shift < 4; ++shift) {
      const int row = warp_ + shift / 2, column = lane_ % 16 + shift % 2;
      const bool inside = column < kSide && band * kBand + row < kSide;
      const unsigned char* pixel = inside ? cells_ + (place_of(row, band) * kSide + column) * kPixel : zeros_;
      const int key = column % 8, half = lane_ / 16;
#pragma unroll
      for (int begin = 0; begin < kInputs / 16; begin += kAtOnce) {
        uint32_t (&fragments)[kAtOnce][4] = left[begin / kAtOnce % 2];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          self_.load_fragment(pixel + (((begin + k) * 2 + half) ^ key) * 16, fragments[k]);
        }
        self_.begin_products();
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int step = begin + k;  // of 16 channels
#pragma unroll
          for (int phase = 0; phase < 4; ++phase) {
            if (!reads(phase, shift)) continue;
            const Right weights = first + (place(phase, shift) * kFirst + step / 4 * (kFirst / 2) + step % 4 * 32);
            self_.product(Type{}, sums_[phase], fragments[k], weights, shift + step > 0);
          }
        }
        self_.end_products();
        self_.template wait_products<1>();  // then the fragments before these are free
      }
    }
    self_.template wait_products<0>();
  }

  // ---- the second layer --------------------------------------------------------------------------------------------

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

  // Leaves in `own_` what is this row's, in shared memory what goes up and down.
  FASTINV_BLOCK void give(int band) {
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
    self_.template wait_products<0>();
#pragma unroll
    for (int i = 0; i < 4 * kGiven / 8; ++i) given[0][i] += given[1][i];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float to_left[2], to_right[2];
      from_right(given[0][4 * kLeft + e], given[0][4 * kLeft + 2 + e], to_left);
      from_left(given[0][4 * kRight + e], given[0][4 * kRight + 2 + e], to_right);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        own_[value(e, h, 0)] = given[0][4 * kEven + 2 * h + e] + to_right[h];
        own_[value(e, h, 1)] = given[0][4 * kOdd + 2 * h + e] + to_left[h];
      }
      send(above, e, up_ + warp_ * kRowSent);
      send(below, e, down_ + (warp_ < kBand - 1 ? warp_ : kBand - 1 + band % 2) * kRowSent);
    }
  }

  // Of cells' values, those of rows lane / 4 and lane / 4 + 8, the neighbours'; 0 outside the image.
  FASTINV_BLOCK void from_right(float low, float high, float (&found)[2]) const {
    const int lane = (lane_ + 4) % kWarp;
    const float next_low = self_.shuffle(low, lane), next_high = self_.shuffle(high, lane);
    const bool edge = lane_ >= kWarp - 4;
    found[0] = edge ? next_high : next_low;
    found[1] = edge ? 0.0f : next_high;
  }
  FASTINV_BLOCK void from_left(float low, float high, float (&found)[2]) const {
    const int lane = (lane_ + kWarp - 4) % kWarp;
    const float next_low = self_.shuffle(low, lane), next_high = self_.shuffle(high, lane);
    const bool edge = lane_ < 4;
    found[0] = edge ? 0.0f : next_low;
    found[1] = edge ? next_low : next_high;
  }

  // Gives [cell, column parity · 4 + output] of this row to the one above or below.
  FASTINV_BLOCK void send(const float (&given)[8], int e, float* to) {
    float right[2], left[2];
    from_right(given[4 + e], given[6 + e], right);
    from_left(given[4 + e], given[6 + e], left);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float across = lane_ % 4 < 2 ? left[h] : right[h];
      to[(lane_ / 4 + 8 * h) * 8 + lane_ % 4 * 2 + e] = given[2 * h + e] + across;
    }
  }

  // Of a thread's eight values that of output lane % 2 · 2 + e, the cell lane / 4 + 8 · h, and a column's parity.
  FASTINV_BLOCK static constexpr int value(int e, int h, int parity) { return 4 * e + 2 * h + parity; }

  // Adds what came from above and below, and stores what is complete. Lanes have even rows of pixels where lane % 4 <
  // 2, for which the row of cells above counts, and odd ones, for which that below does: a band's last waits for the
  // next band. `down_` is what the rows above sent; what a band's last row did has a place that changes, for the next
  // band.
  FASTINV_BLOCK void take(int n, int band) {
    const bool odd = lane_ % 4 >= 2, last = warp_ == kBand - 1;
    const int row = band * kBand + warp_;
    float* waiting = up_ + kSent + lane_;
    if (last && band > 0) {
      float before[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) before[i] = waiting[i * kWarp];
      put_row(n, row - kBand, before, up_, odd);
    }
    const float* above = warp_ > 0 ? down_ + (warp_ - 1) * kRowSent : down_ + (kBand - 1 + (band + 1) % 2) * kRowSent;
    const float* below = last ? nullptr : up_ + (warp_ + 1) * kRowSent;
    put_row(n, row, own_, odd ? below : row == 0 ? nullptr : above, !(odd && last && band + 1 < kBands));
    if (last) {
#pragma unroll
      for (int i = 0; i < 8; ++i) waiting[i * kWarp] = own_[i];
    }
  }

  FASTINV_BLOCK void put_row(int n, int row, const float (&own)[8], const float* other, bool complete) const {
    if (!complete) return;
    const int first = lane_ % 2 * 2;
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = own[i] + last_bias_[first + i / 4];
    if (other != nullptr) {
      other += lane_ / 4 * 8 + first;
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += other[i / 2 % 2 * 64 + i % 2 * 4 + i / 4];
    }
    finish(p_, x);
    const int64_t line = int64_t{n} * p_.out_n + int64_t{2 * row + lane_ % 4 / 2} * p_.out_y;
    const bool pairs = p_.result == Result::kFloat32 && p_.out_x == 1;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (first + e >= p_.outputs) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t at = line + int64_t{first + e} * p_.out_c + int64_t{lane_ / 4 * 2 + 16 * h} * p_.out_x;
        const float low = x[value(e, h, 0)], high = x[value(e, h, 1)];
        if (pairs) {
          *reinterpret_cast<Two*>(static_cast<float*>(p_.out) + at) = {{low, high}};
        } else {
          store(p_, at, low);
          store(p_, at + p_.out_x, high);
        }
      }
    }
  }

  const Tail& p_;
  Thread& self_;
  const int team_, warp_, lane_;
  unsigned char *first_, *last_, *zeros_;
  float *bias_, *last_bias_;
  unsigned char* cells_;
  float *up_, *down_;
  float sums_[4][kBetween / 2];  // [phase]
  float own_[8];
};

}  // namespace tail

template <class Type, bool kChannelsLast, class Thread>
FASTINV_BLOCK void run_tail(const Tail& p, Thread& self, unsigned char* shared, int block, int blocks) {
  tail::Worker<Type, kChannelsLast, Thread>(p, self, shared).run(block, blocks);
}

// launch(type, whether channels are last): what the kernels are compiled for.
template <class F>
void with_type(const Tail& p, F&& launch) {
  const auto of = [&](auto type) {
    p.channels_last ? launch(type, std::true_type{}) : launch(type, std::false_type{});
  };
  p.float16 ? of(Float16{}) : of(Bfloat16{});
}

}  // namespace fastinv
