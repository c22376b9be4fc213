// The last two layers of a decoder in one launch: a transposed convolution that doubles 16×16 pixels (3×3, stride 2),
// an activation, and a 3×3 convolution to a few channels. What lies between them never leaves the registers.
//
// As in `kernels/triton/pair.py` both are on one grid of cells, the input's pixels: a cell has 2×2 pixels of the first
// layer, one of each phase (row parity · 2 + column parity), and 2×2 of the second. A persistent block keeps all
// weights in shared memory and takes image after image, 8 rows of cells at a time, the next 8 on their way in registers
// meanwhile. A warp has a row of 16 cells:
//
//   1. sums[phase] [16 cells, kBetween] = Σ over shifts (0 or 1 down, 0 or 1 right) x[cell + shift] · first[shift,
//   phase]
//   2. activated, they are the left factors of what each phase gives to the pixels around: [16, kBetween] ·
//   last[phase].
//      A column is an output of this cell or of a neighbour; see `Column`.
//   3. What goes to the left and to the right is exchanged between lanes, what goes up and down through shared memory.
//
// That is 9 · 2 products of 64×64×64 for 64 cells, and 4 of 64×48×64: 37.7 and 6.3 MFLOP an image at 128 channels,
// where the direct form has 37.7 and 3.5. At 4,096 FLOPs a cycle they take 10,700 cycles of a multiprocessor.
#pragma once

#include <type_traits>

#include "warpgroup.h"

namespace fastinv {

enum class Result : int32_t { kFloat32, kBfloat16, kFloat16, kUint8 };
enum class Finish : int32_t { kIdentity, kLeakyRelu, kSigmoid, kTanh, kClamp };

struct Tail {
  // Two-byte values: [images, kInputs, kSide, kSide], or [images, kSide, kSide, kInputs] if `channels_last`.
  const void* x;
  const void *first, *last;       // weights, as they lie in shared memory: `kFirstBytes`, `kLastBytes`
  const float *bias, *last_bias;  // [kBetween], [outputs], or null
  void* out;                      // [images, outputs, 2·kSide, 2·kSide], of these strides
  int32_t* flag;                  // [1], set to 1 where x holds NaN or Inf; or null
  int32_t images, outputs, channels_last, float16;
  int32_t out_n, out_c, out_y, out_x;
  Result result;
  float slope;    // of the first layer's activation below 0: 0 for ReLU, 1 for none
  Finish finish;  // of the second layer
  float a, b;     // its parameters
};

namespace tail {

constexpr int kInputs = 128, kBetween = 64, kMostOutputs = 4;
constexpr int kSide = 16, kBand = 8, kRows = kBand + 1;  // cells of an image; rows at a time, and with the next one
constexpr int kThreads = kBand * kWarp;
constexpr int kRow = 128;                         // bytes: of a row that tensor cores read
constexpr int kPixel = 2 * kInputs;               // bytes
constexpr int kAtOnce = 2;                        // 16s of channels of which a thread has fragments
constexpr int kFirst = kBetween * kPixel;         // bytes of a shift and a phase
constexpr int kGiven = 32, kAcross = 16;          // columns of the second product: within a row, and to others
constexpr int kLast = (kGiven + kAcross) * kRow;  // bytes of a phase
constexpr int kFirstBytes = 9 * kFirst, kLastBytes = 4 * kLast;
constexpr int kCells = kRows * kSide * kPixel;
constexpr int kSent = kBand * kSide * 8;  // floats that rows of cells give to those above, or below
constexpr int kWaiting = 8 * kWarp;       // floats of a row that waits for the one below
constexpr int kShared =
    kFirstBytes + kLastBytes + kCells + kPixel + 4 * (kBetween + 2 * kSent + kWaiting + kMostOutputs);

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

struct alignas(8) Two {
  float at[2];
};

// Eight pixels' worth of eight channels on their way, and where they go.
struct Chunk {
  Words words[8];
};

FASTINV_BLOCK inline float sigmoid(float x) {
  const float e = expf(-fabsf(x));  // at most 1: no overflow
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// The second layer's activation, of some values: one branch for all.
template <int kCount>
FASTINV_BLOCK void finish(const Tail& p, float (&x)[kCount]) {
  const auto each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = f(x[i]);
  };
  switch (p.finish) {
    case Finish::kIdentity: break;
    case Finish::kLeakyRelu: each([&](float v) { return v < 0.0f ? p.a * v : v; }); break;
    case Finish::kSigmoid: each([](float v) { return sigmoid(v); }); break;
    case Finish::kTanh: each([](float v) { return tanhf(v); }); break;
    case Finish::kClamp: each([&](float v) { return v < p.a ? p.a : v > p.b ? p.b : v; });
  }
}

FASTINV_BLOCK inline void store(const Tail& p, int64_t at, float x) {
  switch (p.result) {
    case Result::kFloat32: static_cast<float*>(p.out)[at] = x; break;
    case Result::kBfloat16: static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(pack(Bfloat16{}, x, 0.0f)); break;
    case Result::kFloat16: static_cast<uint16_t*>(p.out)[at] = static_cast<uint16_t>(pack(Float16{}, x, 0.0f)); break;
    case Result::kUint8:  // NaN becomes 0
      static_cast<uint8_t*>(p.out)[at] = static_cast<uint8_t>(rintf(255.0f * (x > 0.0f ? x < 1.0f ? x : 1.0f : 0.0f)));
  }
}

// What a thread does. All is in the order of the steps above.
template <class Type, bool kChannelsLast, class Thread>
class Worker {
 public:
  FASTINV_BLOCK Worker(const Tail& p, Thread& self, unsigned char* shared)
      : p_(p),
        self_(self),
        warp_(self.index() / kWarp),
        lane_(self.index() % kWarp),
        first_(shared),
        last_(first_ + kFirstBytes),
        cells_(last_ + kLastBytes),
        zeros_(cells_ + kCells),
        bias_(reinterpret_cast<float*>(zeros_ + kPixel)),
        up_(bias_ + kBetween),
        down_(up_ + kSent),
        waiting_(down_ + kSent + lane_),
        last_bias_(down_ + kSent + kWaiting) {}

  // Images block, block + blocks, …
  FASTINV_BLOCK void run(int block, int blocks) {
    if (block >= p_.images) return;
    Chunk chunk;
    begin(block, chunk);
    for (int n = block; n < p_.images; n += blocks) {
#pragma unroll 1
      for (int band = 0; band < 2; ++band) {
        put(chunk, band);
        self_.sync();
        if (band == 0) {
          fetch_second(n, n + blocks, chunk);
        } else if (n + blocks < p_.images) {
          fetch_first(n + blocks, chunk);
        }
        multiply(band);
        give(band);
        self_.sync();
        take(n, band);
      }
    }
  }

 private:
  // ---- the input: a thread brings 8 channels of half a row of cells, those of a quarter of a warp 64 channels
  // --------

  FASTINV_BLOCK int octet() const { return lane_ % 8 + 8 * (warp_ % 2); }
  FASTINV_BLOCK int group() const { return warp_ / 2 * 4 + lane_ / 8; }

  FASTINV_BLOCK void fetch(int n, int row, Chunk& chunk) {
    const auto* x = static_cast<const unsigned char*>(p_.x);
    const int column = group() % 2 * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int64_t at;
      if constexpr (kChannelsLast) {
        at = ((int64_t{n} * kSide + row) * kSide + column + i) * kInputs + octet() * 8;
      } else {
        at = ((int64_t{n} * kInputs + octet() * 8 + i) * kSide + row) * kSide + column;
      }
      chunk.words[i] = *reinterpret_cast<const Words*>(x + 2 * at);
    }
  }
  // Rows 1 to 8 of an image.
  FASTINV_BLOCK void fetch_first(int n, Chunk& chunk) { fetch(n, 1 + group() / 2, chunk); }
  // Rows 9 to 15, and row 0 of the image after.
  FASTINV_BLOCK void fetch_second(int n, int after, Chunk& chunk) {
    if (group() / 2 < kBand - 1) {
      fetch(n, kRows + group() / 2, chunk);
    } else if (after < p_.images) {
      fetch(after, 0, chunk);
    }
  }

  FASTINV_BLOCK void check(const Chunk& chunk) const {
    uint32_t low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint32_t word = chunk.words[i].at[k];
        if ((word & 0x7fffu) > low) low = word & 0x7fffu;
        if ((word & 0x7fff0000u) > high) high = word & 0x7fff0000u;
      }
    }
    if (low >= Type::kInfinity || high >= Type::kInfinity << 16) *p_.flag = 1;
  }

  // Rows of cells lie in places 0 to 8. Row 8, which both halves of an image read, stays where it is; before it the
  // second half's rows, and row 0 of the image after, take the places of the first half's.
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
  FASTINV_BLOCK void put(const Chunk& chunk, int band) {
    const int row = group() / 2;
    put_at(band == 1 && row == kBand - 1 ? 0 : 1 + row, chunk);
  }

  FASTINV_BLOCK void begin(int block, Chunk& chunk) {
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
    if (group() / 2 == kBand - 1) {
      fetch(block, 0, chunk);
      put_at(0, chunk);
    }
    fetch_first(block, chunk);
  }

  // ---- the first layer
  // ------------------------------------------------------------------------------------------------

  FASTINV_BLOCK void multiply(int band) {
    uint32_t left[2][kAtOnce][4];
#pragma unroll
    for (int shift = 0; shift < 4; ++shift) {
      const int row = warp_ + shift / 2, column = lane_ % 16 + shift % 2;
      const bool inside = column < kSide && (band == 0 || row < kBand);
      const int at = band == 1 && row == 0 ? kBand : row;
      const unsigned char* pixel = inside ? cells_ + (at * kSide + column) * kPixel : zeros_;
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
            const unsigned char* weights =
                first_ + place(phase, shift) * kFirst + step / 4 * (kFirst / 2) + step % 4 * 32;
            self_.product(Type{}, sums_[phase], fragments[k], weights, shift + step > 0);
          }
        }
        self_.end_products();
        self_.template wait_products<1>();  // then the fragments before these are free
      }
    }
    self_.template wait_products<0>();
  }

  // ---- the second layer
  // -----------------------------------------------------------------------------------------------

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
    float given[4 * kGiven / 8], above[4 * kAcross / 8], below[4 * kAcross / 8];
    uint32_t left[4][4][4];
    if (p_.slope == 0.0f) {
      activate(left, [](float low, float high) { return pack_relu(Type{}, low, high); });
    } else {
      activate(left, [&](float low, float high) {
        return pack(Type{}, low < 0.0f ? p_.slope * low : low, high < 0.0f ? p_.slope * high : high);
      });
    }
    self_.begin_products();
#pragma unroll
    for (int phase = 0; phase < 4; ++phase) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const unsigned char* weights = last_ + phase * kLast + k * 32;
        self_.product(Type{}, given, left[phase][k], weights, phase + k > 0);
        self_.product(Type{}, phase < 2 ? above : below, left[phase][k], weights + kGiven * kRow, phase % 2 + k > 0);
      }
    }
    self_.end_products();
    self_.template wait_products<0>();
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float to_left[2], to_right[2];
      from_right(given[4 * kLeft + e], given[4 * kLeft + 2 + e], to_left);
      from_left(given[4 * kRight + e], given[4 * kRight + 2 + e], to_right);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        own_[value(e, h, 0)] = given[4 * kEven + 2 * h + e] + to_right[h];
        own_[value(e, h, 1)] = given[4 * kOdd + 2 * h + e] + to_left[h];
      }
      send(above, e, up_, warp_);
      if (band == 0 || warp_ < kBand - 1) send(below, e, down_, warp_);
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
  FASTINV_BLOCK void send(const float (&given)[8], int e, float* to, int row) {
    float right[2], left[2];
    from_right(given[4 + e], given[6 + e], right);
    from_left(given[4 + e], given[6 + e], left);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float across = lane_ % 4 < 2 ? left[h] : right[h];
      to[(row * kSide + lane_ / 4 + 8 * h) * 8 + lane_ % 4 * 2 + e] = given[2 * h + e] + across;
    }
  }

  // Of a thread's eight values that of output lane % 2 · 2 + e, the cell lane / 4 + 8 · h, and a column's parity.
  FASTINV_BLOCK static constexpr int value(int e, int h, int parity) { return 4 * e + 2 * h + parity; }

  // Adds what came from above and below, and stores what is complete. Lanes have even rows of pixels where lane % 4 <
  // 2, for which the row of cells above counts, and odd ones, for which that below does: the last of the first half
  // waits for the second. `down_` is what the row before sent.
  FASTINV_BLOCK void take(int n, int band) {
    const bool odd = lane_ % 4 >= 2, last = warp_ == kBand - 1;
    const int row = band * kBand + warp_;
    const float* above = row == 0 ? nullptr : down_ + (warp_ > 0 ? warp_ - 1 : kBand - 1) * kSide * 8;
    const float* below = last ? nullptr : up_ + (warp_ + 1) * kSide * 8;
    put_row(n, row, own_, odd ? below : above, !(odd && last && band == 0));
    if (!last) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (band == 0) {
        waiting_[i * kWarp] = own_[i];
      } else {
        own_[i] = waiting_[i * kWarp];
      }
    }
    if (band == 1) put_row(n, kBand - 1, own_, up_, odd);
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
  const int warp_, lane_;
  unsigned char *first_, *last_, *cells_, *zeros_;
  float *bias_, *up_, *down_, *waiting_, *last_bias_;
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
