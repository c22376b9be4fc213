// Attention: for each head softmax(scale · q · kᵀ) · v, and the way back, by blocks of queries.
#pragma once

#include "kernels/transpose.h"
#include "kernels/vectors.h"

// ---- products of small matrices ------------------------------------------------------------------------------------

// c[m][n] = Σ_k a[m · a_row + k · a_step] · b[k · b_row + n], added to what is there where `accumulate`.
struct Matmul {
  int64_t rows, columns, depth;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
};

template <int kRows, int kVectors>
void matmul_tile(const Matmul& m, const float* a, const float* b, float* c, int last_lanes) {
  const auto lanes = [last_lanes](int v) { return v == kVectors - 1 ? last_lanes : kWidth; };
  V acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = m.accumulate ? load_first(c + r * m.c_row + v * kWidth, lanes(v)) : zero();
    }
  }
  for (int64_t k = 0; k < m.depth; ++k, a += m.a_step, b += m.b_row) {
    V row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load_first(b + v * kWidth, lanes(v));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V x = set1(a[r * m.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(x, row[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_first(c + r * m.c_row + v * kWidth, acc[r][v], lanes(v));
  }
}

template <int kVectors>
FASTINV_INLINE void matmul_columns(const Matmul& m, int64_t column, int last_lanes) {
  const float *a = m.a, *b = m.b + column;
  float* c = m.c + column;
  int64_t row = 0;
  for (; row + 6 <= m.rows; row += 6) {
    matmul_tile<6, kVectors>(m, a + row * m.a_row, b, c + row * m.c_row, last_lanes);
  }
  for (; row + 2 <= m.rows; row += 2) {
    matmul_tile<2, kVectors>(m, a + row * m.a_row, b, c + row * m.c_row, last_lanes);
  }
  if (row < m.rows) matmul_tile<1, kVectors>(m, a + row * m.a_row, b, c + row * m.c_row, last_lanes);
}

void matmul(const Matmul& m) {
  constexpr int kBlock = kMaxVectors * kWidth;
  int64_t column = 0;
  for (; column + kBlock <= m.columns; column += kBlock) matmul_columns<kMaxVectors>(m, column, kWidth);
  const int left = static_cast<int>(m.columns - column), last = left % kWidth == 0 ? kWidth : left % kWidth;
  switch ((left + kWidth - 1) / kWidth) {
    case 1: return matmul_columns<1>(m, column, last);
    case 2: return matmul_columns<2>(m, column, last);
    case 3: return matmul_columns<3>(m, column, last);
    case 4: return matmul_columns<4>(m, column, last);
  }
}

// ---- attention -----------------------------------------------------------------------------------------------------

// One head of one image, and what it needs of the scratch memory.
struct AttentionHead {
  const AttentionArgs& a;
  const int64_t q_row, v_row, pitch;  // floats from token to token, and of a row of scores, in whole vectors
  const float *q, *k, *v;
  float *keys, *values;    // turned over: [channel][pitch]
  float *scores, *slopes;  // [block of queries][pitch]
  float* inverse;          // 1 / Σ e^score, of each query of the block

  AttentionHead(const AttentionArgs& args, int64_t head)
      : a(args),
        q_row(int64_t{args.heads} * args.channels),
        v_row(int64_t{args.heads} * args.value_channels),
        pitch((args.keys + kWidth - 1) / kWidth * kWidth),
        q(args.q + head * args.channels),
        k(args.k + head * args.channels),
        v(args.v + head * args.value_channels),
        keys(args.scratch),
        values(keys + pitch * args.channels),
        scores(values + pitch * args.value_channels),
        slopes(scores + pitch * kAttentionBlock),
        inverse(slopes + pitch * kAttentionBlock) {
    transpose(k, q_row, keys, pitch, a.keys, a.channels);
    // No key that is not there is ever the most similar.
    for (int64_t r = 0; r < kAttentionBlock; ++r) {
      for (int64_t s = a.keys; s < pitch; ++s) scores[r * pitch + s] = -3e38f;
    }
  }

  int64_t rows(int64_t first) const {
    return a.queries - first < kAttentionBlock ? a.queries - first : kAttentionBlock;
  }

  // e^(score − the largest) of these queries.
  void weigh(int64_t first) const {
    matmul({rows(first), a.keys, a.channels, q + first * q_row, q_row, 1, keys, pitch, scores, pitch, false});
    for (int64_t r = 0; r < rows(first); ++r) {
      float* row = scores + r * pitch;
      V largest = set1(-3e38f);
      const auto lanes = [this](int64_t s) { return a.keys - s < kWidth ? static_cast<int>(a.keys - s) : kWidth; };
      for (int64_t s = 0; s < a.keys; s += kWidth) {
        store_first(row + s, mul(load_first(row + s, lanes(s)), set1(a.scale)), lanes(s));
        largest = max(largest, load(row + s));
      }
      float each[kWidth];
      store(each, largest);
      float most = each[0];
      for (int l = 1; l < kWidth; ++l) most = each[l] > most ? each[l] : most;
      V total = zero();
      for (int64_t s = 0; s < a.keys; s += kWidth) {
        const V e = exp(sub(load(row + s), set1(most)));
        total = add(total, lanes(s) == kWidth ? e : first_of(e, lanes(s)));
        store_first(row + s, e, lanes(s));
      }
      inverse[r] = 1.0f / sum(total);
    }
  }

  // Gradients of the scores of these queries, from those of the results.
  void back_to_scores(const float* grad, int64_t first) const {
    matmul(
        {rows(first), a.keys, a.value_channels, grad + first * v_row, v_row, 1, values, pitch, slopes, pitch, false});
    for (int64_t r = 0; r < rows(first); ++r) {
      const float* weight = scores + r * pitch;
      float* slope = slopes + r * pitch;
      V total = zero();
      for_vectors(a.keys, [&](int64_t s, int lanes) {
        total = fma(load_first(weight + s, lanes), load_first(slope + s, lanes), total);
      });
      const V mean = set1(sum(total) * inverse[r]), factor = set1(inverse[r] * a.scale);
      for_vectors(a.keys, [&](int64_t s, int lanes) {
        const V d = sub(load_first(slope + s, lanes), mean);
        store_first(slope + s, mul(mul(d, factor), load_first(weight + s, lanes)), lanes);
      });
    }
  }
};

void attention(const AttentionArgs& a) {
  const int64_t blocks = a.blocks;
  for (int64_t unit = a.first; unit < a.last;) {
    const AttentionHead head(a, unit / blocks);
    for (const int64_t end = (unit / blocks + 1) * blocks; unit < a.last && unit < end; ++unit) {
      const int64_t first = unit % blocks * kAttentionBlock;
      head.weigh(first);
      float* out = a.out + first * head.v_row + unit / blocks * a.value_channels;
      matmul({head.rows(first), a.value_channels, a.keys, head.scores, head.pitch, 1, head.v, head.v_row, out,
              head.v_row, false});
      for (int64_t r = 0; r < head.rows(first); ++r) {
        float* row = out + r * head.v_row;
        for_vectors(a.value_channels, [&](int64_t e, int lanes) {
          const V y = mul(load_first(row + e, lanes), set1(head.inverse[r]));
          store_first(row + e, activate(y, a.activation), lanes);
        });
      }
    }
  }
}

// Of the queries, by blocks of them; of keys or values, a head at a time: all blocks add to each.
void attention_gradient(const AttentionGradientArgs& args) {
  const AttentionArgs& a = args.attention;
  const bool of_queries = args.input == 0;
  const int64_t blocks = a.blocks, units = of_queries ? 1 : blocks;
  for (int64_t unit = a.first * units; unit < a.last * units;) {
    const int64_t number = unit / blocks;
    const AttentionHead head(a, number);
    const float* grad = args.grad_out + number * a.value_channels;
    if (args.input != 2) transpose(head.v, head.v_row, head.values, head.pitch, a.keys, a.value_channels);
    for (const int64_t end = (number + 1) * blocks; unit < a.last * units && unit < end; ++unit) {
      const int64_t first = unit % blocks * kAttentionBlock, rows = head.rows(first);
      const bool accumulate = args.accumulate || (!of_queries && first > 0);
      head.weigh(first);
      if (args.input == 2) {
        for (int64_t r = 0; r < rows; ++r) {
          float* row = head.scores + r * head.pitch;
          for_vectors(a.keys, [&](int64_t s, int lanes) {
            store_first(row + s, mul(load_first(row + s, lanes), set1(head.inverse[r])), lanes);
          });
        }
        matmul({a.keys, a.value_channels, rows, head.scores, 1, head.pitch, grad + first * head.v_row, head.v_row,
                args.grad_in + number * a.value_channels, head.v_row, accumulate});
        continue;
      }
      head.back_to_scores(grad, first);
      float* into = args.grad_in + number * a.channels;
      if (of_queries) {
        matmul({rows, a.channels, a.keys, head.slopes, head.pitch, 1, head.k, head.q_row, into + first * head.q_row,
                head.q_row, accumulate});
      } else {
        matmul({a.keys, a.channels, rows, head.slopes, 1, head.pitch, head.q + first * head.q_row, head.q_row, into,
                head.q_row, accumulate});
      }
    }
  }
}
