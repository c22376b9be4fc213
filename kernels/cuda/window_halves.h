// A 3×3 convolution of float32 from 64 channels to at most 64, on tensor cores that multiply float16: pixels and
// weights are sums of two float16 each (`halved`), and of their four products the three that matter are added up, 22
// bits of 24. Layers with more channels take several launches, each of which adds to what the one before has left.
//
// As in `window.h` weights stay in shared memory, and a pixel is brought there once for all taps: here as float32, by
// registers, where it is split. float16 has few exponents, so an image is multiplied by a power of two that brings its
// largest value to 2^12 or above; of a value that is 2^20 times smaller 17 bits are left. As its rows come the largest
// is not known yet: where a new row has a larger one than there is room for, the power changes, and with it the rows
// that are there. An image that holds NaN or Inf has no right results from there on.
//
// A band of 64 cells is 9 · 4 · 3 products of 64×64×16: 3,456 cycles of the tensor cores, for 4.7 MFLOP in direct
// form. It brings 16 KB and leaves as many, 9.5 bytes a cycle, where an H100 has 13 of HBM for a multiprocessor; what
// another launch has left is 4.7 more.
#pragma once

#include "finish.h"
#include "window.h"

namespace fastinv {

// A launch. The channels of a pixel lie side by side; of x, addend, saved and out the pointer is to the first that is
// read or written.
struct HalvedLayer {
  const float* x;       // [images, height, width, x_pitch], of which 64 are read
  const void* weights;  // as they lie in shared memory, tap by tap the high halves and the low ones
  const float* bias;    // [outputs], or null
  const float* addend;  // like out, or null: it may be out
  const float* saved;   // like out, or null: results of an activation, by whose slope there the result is multiplied
  float* out;           // [images, height, width, out_pitch], of which `outputs` are written
  int32_t images, height, width, x_pitch, out_pitch, outputs;
  float unscale;  // undoes the power of two that is in the weights
  Finish finish;  // the activation; of one that is saved kLeakyRelu
  float a, b;     // its parameters
};

namespace window {

// Rows of float32 in the ring as two halves of every channel, the high ones of a pixel before the low ones. For images
// of kWidth cells across, which divide a band.
template <int kWidth, class Thread>
class HalvedWindow : Window<Float16, 128, kWidth, Around, Thread> {
  using Base = Window<Float16, 128, kWidth, Around, Thread>;
  using Base::self_, Base::height_, Base::warp_, Base::lane_, Base::weights_, Base::place_of, Base::row_bytes;

 public:
  using Base::kPixel, Base::kWeights;
  static constexpr int kRows = kBand / kWidth;                       // of a band
  static constexpr int kRing = Base::ring(kWidth), kMaxima = 4 * 4;  // bytes of a warpgroup
  static_assert(kBand % kWidth == 0 && kWidth % 8 == 0);

  // Args:
  //   x: [images, height, kWidth, pitch], from a multiple of 16 bytes on.
  //   weights, ring, maxima: in shared memory; the ring is full of zeros at first.
  FASTINV_BLOCK HalvedWindow(Thread& self, const float* x, int height, int pitch, const unsigned char* weights,
                             unsigned char* ring, uint32_t* maxima)
      : Base(self, x, height, {}, weights, ring), x_(x), pitch_(pitch), maxima_(maxima) {}

  // Start the rows on their way that follow the first of a band, and that of the next: a band's worth. An image's first
  // row, for which there are no registers, is brought to the L2 cache.
  FASTINV_BLOCK void fetch(int n, int band) {
    if (band == 0) {
#pragma unroll
      for (int i = 0; i < kFirst; ++i) {
        self_.ask_for(reinterpret_cast<const unsigned char*>(place_in_x(n, 0, column_of(i))));
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = row_of(band, i);
      if (row < height_) pieces_[i] = piece_of(n, row, column_of(i));
    }
  }

  // Bring them to the ring, before the first band with the image's first row. The threads of the warpgroup wait for
  // each other within, before any row is written, and have to before they multiply.
  FASTINV_BLOCK void put(int n, int band) {
    Words first[kFirst];
    uint32_t largest = 0;  // of floats without their signs, which are in the order of their bits
    if (band == 0) {
#pragma unroll
      for (int i = 0; i < kFirst; ++i) first[i] = piece_of(n, 0, column_of(i));
#pragma unroll
      for (int i = 0; i < kFirst; ++i) largest = larger(largest, first[i]);
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (row_of(band, i) < height_) largest = larger(largest, pieces_[i]);
    }
    expect(self_.largest(largest), band);
    if (band == 0) {
#pragma unroll
      for (int i = 0; i < kFirst; ++i) {
        put_piece({}, -1, column_of(i));
        put_piece(first[i], 0, column_of(i));
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      put_piece(row_of(band, i) < height_ ? pieces_[i] : Words{}, row_of(band, i), column_of(i));
    }
  }

  // Sums of a band, times `unit`. Tensor cores cut off what a sum has no room for: products with a low half are summed
  // apart. (In a model of them random numbers were 2.2e-6 off together, and are 0.7e-6 apart.)
  template <class Ready>
  FASTINV_BLOCK void multiply(int band, float (&sums)[kOutputs / 2], Ready&& ready) {
    const Right weights(weights_);
    float lower[kOutputs / 2];
    this->along_taps(
        band,
        [&](int shift, int step, const uint32_t (&fragment)[4], bool keep) {
          const Right high = weights + (shift * 2 * kTile + step % 4 * 32);
          if (step < 4) {
            self_.product(Float16{}, sums, fragment, high, keep);
            self_.product(Float16{}, lower, fragment, high + kTile, keep);
          } else {
            self_.product(Float16{}, lower, fragment, high, true);
          }
        },
        ready);
    self_.take_products(sums, lower);
#pragma unroll
    for (int i = 0; i < kOutputs / 2; ++i) sums[i] += lower[i];
  }
  FASTINV_BLOCK float unit() const { return power_of_two(exponent_ - kBelow); }

 private:
  static constexpr int kBelow = 126 + 15;          // what brings floats of an exponent, which is biased, below 2^15
  static constexpr int kLeast = kBelow - 127;      // exponent: then a float's power is 2^127
  static constexpr int kRoom = 2;                  // powers of two by which values may grow
  static constexpr int kLanes = 16;                // that bring a pixel, four channels each
  static constexpr int kPixels = kTeam / kLanes;   // that a warpgroup brings at once
  static constexpr int kPieces = kBand / kPixels;  // that a thread brings of a band
  static constexpr int kFirst = kWidth / kPixels;  // and of a row

  FASTINV_BLOCK static float power_of_two(int n) { return as_float(static_cast<uint32_t>(127 + n) << 23); }

  FASTINV_BLOCK int piece() const { return lane_ % kLanes; }
  FASTINV_BLOCK static constexpr int row_of(int band, int i) { return band * kRows + 1 + i * kPixels / kWidth; }
  FASTINV_BLOCK int column_of(int i) const { return i * kPixels % kWidth + warp_ * (kWarp / kLanes) + lane_ / kLanes; }
  FASTINV_BLOCK const float* place_in_x(int n, int row, int column) const {
    return x_ + ((int64_t{n} * height_ + row) * kWidth + column) * pitch_ + 4 * piece();
  }
  FASTINV_BLOCK Words piece_of(int n, int row, int column) const {
    return *reinterpret_cast<const Words*>(place_in_x(n, row, column));
  }
  FASTINV_BLOCK static uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
  FASTINV_BLOCK static uint32_t larger(uint32_t largest, const Words& floats) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = larger(largest, floats.at[i] & 0x7fffffffu);
    return largest;
  }

  // Choose the power for rows whose largest value has these bits, in this warp.
  FASTINV_BLOCK void expect(uint32_t largest, int band) {
    if (lane_ == 0) maxima_[warp_] = largest;
    self_.sync(self_.index() / kTeam);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = larger(largest, maxima_[i]);
    const int found = static_cast<int>(largest >> 23);
    if (band > 0 && found <= exponent_) return;
    const int next = (found > kLeast ? found : kLeast) + kRoom;
    if (band > 0) lower(band, next - exponent_);
    exponent_ = next;
  }
  // The two rows of a band that the one before has brought, times 2^-down.
  FASTINV_BLOCK void lower(int band, int down) {
    const uint32_t half = down < 15 ? static_cast<uint32_t>(15 - down) << 10 : down < 25 ? 1u << (24 - down) : 0u;
#pragma unroll
    for (int row = band * kRows - 1; row <= band * kRows; ++row) {
      unsigned char* place = place_of(row);
#pragma unroll 1
      for (int i = 16 * (self_.index() % kTeam); i < row_bytes(); i += 16 * kTeam) {
        Words& words = *reinterpret_cast<Words*>(place + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) words.at[k] = times(Float16{}, words.at[k], half * 0x10001u);
      }
    }
  }

  FASTINV_BLOCK void put_piece(const Words& floats, int row, int column) {
    const float power = power_of_two(kBelow - exponent_);
    Halved both[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      both[i] = halved(as_float(floats.at[2 * i]) * power, as_float(floats.at[2 * i + 1]) * power);
    }
    unsigned char* to = place_of(row) + (column + 1) * kPixel + (piece() / 2 ^ (column + 1) % 8) * 16 + piece() % 2 * 8;
    *reinterpret_cast<TwoWords*>(to) = {{both[0].high, both[1].high}};
    *reinterpret_cast<TwoWords*>(to + kPixel / 2) = {{both[0].low, both[1].low}};
  }

  const float* x_;
  const int pitch_;
  uint32_t* maxima_;  // of the warps
  int exponent_ = kLeast + kRoom;
  Words pieces_[kPieces] = {};  // on their way: four channels of every eighth pixel
};

// Warpgroups are as many as have room for their rows, and registers: with three some would spill.
template <int kWidth, class Thread>
class HalvedWorker {
  using Cells = HalvedWindow<kWidth, Thread>;

 public:
  static constexpr int kTeams = kWidth <= 32 ? 2 : 1, kThreads = kTeams * kTeam;
  static constexpr int kTeamBytes = Cells::kRing + Cells::kMaxima;
  static constexpr int kShared = Cells::kWeights + 4 * kOutputs + kTeams * kTeamBytes;
  static_assert(kShared <= kMostShared);
  FASTINV_BOTH static int shared(const HalvedLayer&) { return kShared; }

  FASTINV_BLOCK HalvedWorker(const HalvedLayer& p, Thread& self, unsigned char* shared)
      : p_(p),
        self_(self),
        team_(self.index() / kTeam),
        warp_(self.index() % kTeam / kWarp),
        lane_(self.index() % kWarp),
        shared_(shared),
        bias_(reinterpret_cast<float*>(shared + Cells::kWeights)),
        cells_(self, p.x, p.height, p.x_pitch, shared, ring_in(bias_, team_),
               reinterpret_cast<uint32_t*>(ring_in(bias_, team_) + Cells::kRing)) {}

  FASTINV_BLOCK void run(int block, int blocks) {
    const Alternation<kTeams> turns{{team_, blocks, p_.images}};
    const int step = turns.step(), bands = (p_.height + Cells::kRows - 1) / Cells::kRows;
    int n = block + blocks * team_;
    share<Cells::kWeights>(self_, kThreads, shared_, kShared, p_.weights, p_.bias, p_.outputs);
    if (n < p_.images) cells_.fetch(n, 0);
    self_.sync();
    for (; n < p_.images; n += step) {
#pragma unroll 1
      for (int band = 0; band < bands; ++band) {
        cells_.put(n, band);
        self_.sync(team_);
        fetch_next(cells_, n, band, bands, step, p_.images);
        float sums[kOutputs / 2];
        cells_.multiply(band, sums, [&] { turns.wait(self_, n, band); });
        turns.hand_on(self_, n, band, bands);
        put(n, band, sums);
      }
    }
  }

 private:
  FASTINV_BLOCK static unsigned char* ring_in(float* bias, int team) {
    return reinterpret_cast<unsigned char*>(bias + kOutputs) + team * kTeamBytes;
  }

  // A lane has two channels of every eight, of two cells.
  FASTINV_BLOCK void put(int n, int band, float (&sums)[kOutputs / 2]) const {
    const int channel = lane_ % 4 * 2;  // of an eight
    int64_t places[2];
    bool inside[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int cell = band * kBand + warp_ * 16 + lane_ / 4 + 8 * h;
      inside[h] = cell < p_.height * kWidth;
      places[h] = (int64_t{n} * p_.height * kWidth + cell) * p_.out_pitch + channel;
    }
    const float unit = cells_.unit() * p_.unscale;
#pragma unroll
    for (int i = 0; i < kOutputs / 2; ++i) sums[i] = sums[i] * unit + bias_[i / 4 * 8 + channel + i % 2];
    with_others(p_.addend, places, inside, sums, [](float sum, float other) { return sum + other; });
    if (p_.saved == nullptr) {
      finish(p_, sums);
    } else {
      const float a = p_.a;
      with_others(p_.saved, places, inside, sums, [a](float sum, float other) { return other > 0.0f ? sum : a * sum; });
    }
#pragma unroll
    for (int i = 0; i < kOutputs / 2; i += 2) {
      if (inside[i / 2 % 2] && i / 4 * 8 < p_.outputs) {
        *reinterpret_cast<Two*>(p_.out + places[i / 2 % 2] + i / 4 * 8) = {{sums[i], sums[i + 1]}};
      }
    }
  }

  // sums = join(sums, others), if there are others; all are on their way before any is waited for.
  template <class F>
  FASTINV_BLOCK void with_others(const float* others, const int64_t (&places)[2], const bool (&inside)[2],
                                 float (&sums)[kOutputs / 2], F&& join) const {
    if (others == nullptr) return;
    Two found[kOutputs / 4];
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      const bool there = inside[i % 2] && i / 2 * 8 < p_.outputs;
      found[i] = there ? *reinterpret_cast<const Two*>(others + places[i % 2] + i / 2 * 8) : Two{};
    }
#pragma unroll
    for (int i = 0; i < kOutputs / 2; ++i) sums[i] = join(sums[i], found[i / 2].at[i % 2]);
  }

  struct alignas(8) Two {
    float at[2];
  };

  const HalvedLayer& p_;
  Thread& self_;
  const int team_, warp_, lane_;
  unsigned char* shared_;
  float* bias_;
  Cells cells_;
};

}  // namespace window

}  // namespace fastinv
