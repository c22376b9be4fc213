// Attention: for each head softmax(scale · q · kᵀ + bias) · v, and the way back, by blocks of queries.
#pragma once

#include "kernels/matmul.h"
#include "kernels/transpose.h"
#include "kernels/vectors.h"

// One head of one window of an image, and what it needs of the scratch memory.
struct AttentionHead {
  const AttentionArgs& a;
  const int64_t q_row, v_row, pitch;       // floats from token to token, and of a row of scores, in whole vectors
  const int64_t q_at, k_at, v_at, out_at;  // where its first tokens lie
  const float *q, *k, *v, *bias;
  float *keys, *values;    // turned over: [channel][pitch]
  float *scores, *slopes;  // [block of queries][pitch]
  float* inverse;          // 1 / Σ e^score, of each query of the block

  // Head number `unit` of [window][head].
  AttentionHead(const AttentionArgs& args, int64_t unit)
      : a(args),
        q_row(int64_t{args.heads} * args.channels),
        v_row(int64_t{args.heads} * args.value_channels),
        pitch((args.keys + kWidth - 1) / kWidth * kWidth),
        q_at(unit / args.heads * args.queries * q_row + unit % args.heads * args.channels),
        k_at(unit / args.heads * args.keys * q_row + unit % args.heads * args.channels),
        v_at(unit / args.heads * args.keys * v_row + unit % args.heads * args.value_channels),
        out_at(unit / args.heads * args.queries * v_row + unit % args.heads * args.value_channels),
        q(args.q + q_at),
        k(args.k + k_at),
        v(args.v + v_at),
        bias(args.bias ? args.bias + unit % args.biases * args.queries * args.keys : nullptr),
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
      const float* added = bias ? bias + (first + r) * a.keys : nullptr;
      for (int64_t s = 0; s < a.keys; s += kWidth) {
        const V score = mul(load_first(row + s, lanes(s)), set1(a.scale));
        store_first(row + s, added ? add(score, load_first(added + s, lanes(s))) : score, lanes(s));
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
      float* out = a.out + head.out_at + first * head.v_row;
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
    const float* grad = args.grad_out + head.out_at;
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
                args.grad_in + head.v_at, head.v_row, accumulate});
        continue;
      }
      head.back_to_scores(grad, first);
      float* into = args.grad_in + (of_queries ? head.q_at : head.k_at);
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
