// The last two layers of a decoder in one launch: a transposed convolution that doubles 16×16 pixels (3×3, stride 2),
// an activation, and a 3×3 convolution to a few channels. What lies between them never leaves the registers.
//
// As in `kernels/triton/pair.py` both are on one grid of cells, the input's pixels: a cell has 2×2 pixels of the first
// layer, one of each phase (row parity · 2 + column parity), and 2×2 of the second. A persistent block keeps all
// weights in shared memory. Its two warpgroups multiply in turn, so that one does while the other does all else: each
// takes image after image, 4 rows of cells at a time, the next 4 on their way in registers meanwhile. A warp has a row
// of 16 cells:
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

#include "tail_last.h"
#include "taps.h"

namespace fastinv {

namespace tail {

constexpr int kInputs = 128;
constexpr int kPixel = 2 * kInputs;        // bytes
constexpr int kAtOnce = 2;                 // 16s of channels of which a thread has fragments
constexpr int kFirst = kBetween * kPixel;  // bytes of a shift and a phase
constexpr int kFirstBytes = OnwardTwo::kPlaces * kFirst;

// Eight pixels' worth of eight channels on their way.
struct Chunk {
  Words words[8];
};

// What a thread does. All is in the order of the steps above.
template <class Type, bool kChannelsLast, class Thread>
class Worker : LastLayer<Type, 1, Thread> {
  using Last = LastLayer<Type, 1, Thread>;
  using Last::kBand, Last::kSide, Last::p_, Last::self_, Last::team_, Last::warp_, Last::lane_, Last::sums_;

 public:
  static constexpr int kBands = kSide / kBand;
  static constexpr int kCells = (kBand + 1) * kSide * kPixel;  // bytes of the rows, and of the one after them
  static constexpr int kShared =
      kFirstBytes + kLastBytes + kPixel + 4 * (kBetween + kMostOutputs) + kTeams * (kCells + 4 * Last::kFloats);
  static_assert(kShared <= kMostShared);
  static int shared(const Tail&) { return kShared; }

  FASTINV_BLOCK Worker(const Tail& p, Thread& self, unsigned char* shared)
      : Last(p, self, kBands, shared + kFirstBytes, bias_in(shared), bias_in(shared) + kBetween,
             floats_in(shared, self)),
        first_(shared),
        zeros_(first_ + kFirstBytes + kLastBytes),
        cells_(cells_in(shared) + team_ * kCells) {}

  FASTINV_BLOCK void run(int block, int blocks) {
    const Alternation<kTeams> turns{{team_, blocks, p_.images}};
    const int step = turns.step();
    int n = block + blocks * team_;
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
        multiply(band, [&] { turns.wait(self_, n, band); });
        fetch<kEarly, 8>(next, chunk);
        turns.hand_on(self_, n, band, kBands);
        this->give(band, [] {});
        self_.sync(team_);
        this->take(n, band);
      }
    }
  }

 private:
  // Where the biases begin in shared memory, the warpgroups' cells, and what a warpgroup has for the last layer.
  FASTINV_BLOCK static float* bias_in(unsigned char* shared) {
    return reinterpret_cast<float*>(shared + kFirstBytes + kLastBytes + kPixel);
  }
  FASTINV_BLOCK static unsigned char* cells_in(unsigned char* shared) {
    return reinterpret_cast<unsigned char*>(bias_in(shared) + kBetween + kMostOutputs);
  }
  FASTINV_BLOCK static float* floats_in(unsigned char* shared, const Thread& self) {
    return reinterpret_cast<float*>(cells_in(shared) + kTeams * kCells) + self.index() / kTeam * Last::kFloats;
  }

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
    copy_all(self_, kThreads, first_, p_.first, kFirstBytes);
    copy_all(self_, kThreads, first_ + kFirstBytes, p_.last, kLastBytes);
    share_biases(p_, self_, kThreads, bias_in(first_));
    clear_all(self_, kThreads, zeros_, kPixel);
    self_.publish();
  }

  // ---- the first layer ---------------------------------------------------------------------------------------------

  template <class Ready>
  FASTINV_BLOCK void multiply(int band, Ready&& ready) {
    const Right first(first_);
    uint32_t left[2][kAtOnce][4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int down = corner / 2, right = corner % 2, shift = (down + 1) * 3 + right + 1;
      const int row = warp_ + down, column = lane_ % 16 + right;
      const bool inside = column < kSide && band * kBand + row < kSide;
      const unsigned char* pixel = inside ? cells_ + (place_of(row, band) * kSide + column) * kPixel : zeros_;
      const int key = column % 8, half = lane_ / 16;
      along_channels<kInputs / 16, kAtOnce>(
          self_, left, pixel, half, key,
          [&](int step, const uint32_t (&fragment)[4]) {
#pragma unroll
            for (int phase = 0; phase < 4; ++phase) {
              if (!OnwardTwo::reads(phase, shift)) continue;
              const int tile = OnwardTwo::place(phase, shift) * kFirst + step / 4 * (kFirst / 2);
              self_.product(Type{}, sums_[phase], fragment, first + (tile + step % 4 * 32), corner + step > 0);
            }
          },
          [&] {
            if (corner == 0) ready();
          });
    }
    self_.take_products(sums_);
  }

  unsigned char *first_, *zeros_, *cells_;
};

}  // namespace tail

}  // namespace fastinv
