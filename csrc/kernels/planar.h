// Correlation in the layout of the public door, [C, H, W]: pixels of a row in the vector, for layers with few output
// channels at either end of a network. No lane is lost to channels that are not there, sums need no reduction over
// lanes, and nothing has to be transposed.
//
// A register tile is kRows rows of one vector for kOutputs channels. An input row is loaded once for each column tap
// and serves kTaps row taps: with one output channel, loads (two a cycle, but one where they straddle cache lines)
// would otherwise be the limit, and not the FMA unit.
//
// On small images much of a vector lies past the end of a row, and many of its taps in the padding. There images go
// abreast, one in each lane, [C, H, W, lane]: every product counts. Both ways sum in the same order.
#pragma once

constexpr int kPlanarRows[] = {0, FASTINV_MAX_VECTORS > 2 ? 16 : 8, FASTINV_MAX_VECTORS > 2 ? 12 : 4,
                               FASTINV_MAX_VECTORS > 2 ? 8 : 3, FASTINV_MAX_VECTORS > 2 ? 6 : 2};

// Which lanes of the vector that a column tap reads lie inside the image.
struct PlanarColumns {
  Lanes lanes[kMaxPlanarTaps];
  bool whole[kMaxPlanarTaps];
};

// Which of the input rows that a tile reads are there: all; all that every row tap reads for some row of the tile; or
// some. Each that is looked at takes a branch.
enum class PlanarRows { kAll, kInner, kSome };

// The products of kTaps row taps and one column tap of one input channel. Input rows `first` to `last` are there, of
// the kRows + kTaps − 1 that the tile reads; kLanesWhole says that whole vectors are.
template <class L, int kOutputs, int kTaps, int kRows, PlanarRows kThere, bool kLanesWhole>
FASTINV_INLINE void planar_products(typename L::Vector (&acc)[kRows][kOutputs], const float* in, int64_t in_w,
                                    Lanes lanes, const float* w, int first, int last) {
  typename L::Vector weight[kTaps][kOutputs];
#pragma GCC unroll 5
  for (int i = 0; i < kTaps; ++i) {
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) weight[i][o] = L::all(w[i * kOutputs + o]);
  }
#pragma GCC unroll 20
  for (int r = 0; r < kRows + kTaps - 1; ++r, in += in_w) {
    const bool inner = r >= kTaps - 1 && r < kRows;
    if (kThere != PlanarRows::kAll && !(kThere == PlanarRows::kInner && inner) && (r < first || r >= last)) continue;
    const typename L::Vector x = kLanesWhole ? L::get(in) : L::get_lanes(in, lanes);
#pragma GCC unroll 5
    for (int i = 0; i < kTaps; ++i) {
      if (r - i < 0 || r - i >= kRows) continue;
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) acc[r - i][o] = fma(x, weight[i][o], acc[r - i][o]);
    }
  }
}

template <class L, int kOutputs, int kTaps, int kRows, bool kAbreast>
void planar_tile(const PlanarArgs& a, const PlanarColumns& columns, int x0, const float* weights, const float* bias,
                 float* out, const float* addend, const float* next) {
  constexpr int kReads = kRows + kTaps - 1;
  constexpr PlanarRows kAll = PlanarRows::kAll, kInner = PlanarRows::kInner, kSome = PlanarRows::kSome;
  typename L::Vector acc[kRows][kOutputs];
#pragma GCC unroll 4
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) acc[r][o] = L::all(bias[o]);
  }
  const int y0 = a.first_row, rows = a.rows, taps_x = a.taps_x;
  constexpr int kPitch = kAbreast ? kWidth : 1;  // floats from pixel to pixel
  const int64_t in_w = int64_t{a.in_w} * kPitch, plane = a.in_h * in_w;
  struct {
    int64_t offset;
    int first, last;
  } group[kMaxPlanarTaps];  // of row taps
  const int groups = a.taps_y / kTaps;
#pragma GCC unroll 1
  for (int g = 0; g < groups; ++g) {
    const int top = y0 + g * kTaps + a.shift_y;  // input row under the first of these taps, for the tile's first row
    group[g].offset = top * in_w + int64_t{x0 + a.shift_x} * kPitch;
    group[g].first = top < 0 ? -top : 0;
    group[g].last = a.in_h - top < rows + kTaps - 1 ? a.in_h - top : rows + kTaps - 1;
  }
  const float* w = weights;
  const float* in = a.in;
  for (int c = 0; c < a.in_channels; ++c, in += plane) {
    // Planes lie too far apart for the processor to see the pattern.
    for (const float* end = next + a.next_step; next < end; next += 16) __builtin_prefetch(next, 0, 2);
    for (int g = 0; g < groups; ++g) {
      const float* at = in + group[g].offset;
      const int first = group[g].first, last = group[g].last;
      const bool all = first == 0 && last == kReads, inner = first <= kTaps - 1 && last >= kRows;
      for (int k = 0; k < taps_x; ++k, at += kPitch, w += kTaps * kOutputs) {
        const Lanes lanes = columns.lanes[k];
        if (kAbreast) {
          if (!columns.whole[k]) continue;
          if (all) {
            planar_products<L, kOutputs, kTaps, kRows, kAll, true>(acc, at, in_w, lanes, w, 0, kReads);
          } else if (kTaps > 1 && inner) {
            planar_products<L, kOutputs, kTaps, kRows, kInner, true>(acc, at, in_w, lanes, w, first, last);
          } else {
            planar_products<L, kOutputs, kTaps, kRows, kSome, true>(acc, at, in_w, lanes, w, first, last);
          }
        } else if (kTaps > 1 && inner && !all) {
          planar_products<L, kOutputs, kTaps, kRows, kInner, false>(acc, at, in_w, lanes, w, first, last);
        } else if (!all) {
          planar_products<L, kOutputs, kTaps, kRows, kSome, false>(acc, at, in_w, lanes, w, first, last);
        } else if (!kFreeMasks && columns.whole[k]) {
          planar_products<L, kOutputs, kTaps, kRows, kAll, true>(acc, at, in_w, lanes, w, 0, kReads);
        } else {
          planar_products<L, kOutputs, kTaps, kRows, kAll, false>(acc, at, in_w, lanes, w, 0, kReads);
        }
      }
    }
  }
  const ActivationKind kind = a.activation.kind;
  const int64_t out_plane = int64_t{a.out_h} * a.out_w;
  const auto put = [&](int64_t at, V y, int count) {
    if (addend) y = add(y, load_first(addend + at, count));
    store_first(out + at, activate_cheap(y, kind), count);
    if (!is_cheap(kind)) activate_in_place(out + at, count, a.activation);
  };
  const int left = a.out_w - a.step_x * x0, count = left < kWidth ? left : kWidth;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    const int64_t row = (int64_t{y0 + r} * a.step_y + a.phase_y) * a.out_w + a.step_x * x0;
    if (kAbreast) {
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) {
        const int channel = o / a.step_x, x = o % a.step_x;
        if (x < left) put((channel * out_plane + row + x) * kWidth, L::widen(acc[r][o]), kWidth);
      }
    } else if (a.step_x == 1) {
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) put(o * out_plane + row, L::widen(acc[r][o]), count);
    } else if constexpr (kOutputs % 2 == 0) {  // channel pairs are the even and the odd columns of one channel
#pragma GCC unroll 2
      for (int o = 0; o < kOutputs / 2; ++o) {
        V low, high;
        interleave(L::widen(acc[r][2 * o]), L::widen(acc[r][2 * o + 1]), &low, &high);
        put(o * out_plane + row, low, count);
        if (left > kWidth) put(o * out_plane + row + kWidth, high, left < 2 * kWidth ? left - kWidth : kWidth);
      }
    }
  }
}

using PlanarTile = void (*)(const PlanarArgs&, const PlanarColumns&, int, const float*, const float*, float*,
                            const float*, const float*);

template <class L, int kOutputs, int kTaps, bool kAbreast>
PlanarTile planar_tile_for(int rows) {
  constexpr int kMost = kPlanarRows[kOutputs];
  if constexpr (kTaps > 1) {  // with one tap rows past the tile cost nothing
    if (rows <= kMost / 2) return planar_tile<L, kOutputs, kTaps, kMost / 2, kAbreast>;
    if (rows <= kMost * 3 / 4) return planar_tile<L, kOutputs, kTaps, kMost * 3 / 4, kAbreast>;
    if (rows <= kMost * 7 / 8) return planar_tile<L, kOutputs, kTaps, kMost * 7 / 8, kAbreast>;
  }
  return planar_tile<L, kOutputs, kTaps, kMost, kAbreast>;
}

template <class L, bool kAbreast>
PlanarTile planar_tile_for(int outputs, int taps, int rows) {
  switch (outputs * 10 + taps) {
    case 11: return planar_tile_for<L, 1, 1, kAbreast>(rows);
    case 12: return planar_tile_for<L, 1, 2, kAbreast>(rows);
    case 13: return planar_tile_for<L, 1, 3, kAbreast>(rows);
    case 14: return planar_tile_for<L, 1, 4, kAbreast>(rows);
    case 15: return planar_tile_for<L, 1, 5, kAbreast>(rows);
    case 21: return planar_tile_for<L, 2, 1, kAbreast>(rows);
    case 22: return planar_tile_for<L, 2, 2, kAbreast>(rows);
    case 23: return planar_tile_for<L, 2, 3, kAbreast>(rows);
    case 31: return planar_tile_for<L, 3, 1, kAbreast>(rows);
    default: return planar_tile_for<L, 4, 1, kAbreast>(rows);
  }
}

template <bool kAbreast>
void planar_columns(const PlanarArgs& a) {
  constexpr int kColumns = kAbreast ? 1 : kWidth, kPitch = kAbreast ? kWidth : 1;
  const int columns = (a.out_w + a.step_x - 1) / a.step_x;
  const int64_t out_plane = int64_t{a.out_h} * a.out_w * kPitch;
  const float* next = a.next;
  for (int x0 = 0; x0 < columns; x0 += kColumns) {
    PlanarColumns taps;
#pragma GCC unroll 1
    for (int k = 0; k < a.taps_x; ++k) {
      const int x = x0 + k + a.shift_x;
      taps.lanes[k] = lanes_between(-x, a.in_w - x);
      taps.whole[k] = x >= 0 && x + kColumns <= a.in_w;
    }
    const bool narrow = kFastHalves && !kAbreast && columns - x0 <= Narrow::kLanes;
    const float* weights = a.weights;
    for (int done = 0; done < a.out_channels; done += a.block) {
      const int channels = a.out_channels - done < a.block ? a.out_channels - done : a.block;
      const int outputs = channels * a.step_x;
      const float* addend = a.addend ? a.addend + done * out_plane : nullptr;
      const PlanarTile tile = narrow ? planar_tile_for<Narrow, kAbreast>(outputs, a.taps, a.rows)
                                     : planar_tile_for<Wide, kAbreast>(outputs, a.taps, a.rows);
      tile(a, taps, x0, weights, a.bias + done * a.step_x, a.out + done * out_plane, addend, next);
      next += int64_t{a.in_channels} * a.next_step;
      weights += int64_t{outputs} * a.in_channels * a.taps_y * a.taps_x;
    }
  }
}

void planar(const PlanarArgs& a) { a.abreast ? planar_columns<true>(a) : planar_columns<false>(a); }
