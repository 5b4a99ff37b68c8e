// How far a sample's answer may be off, as the sample itself shows it.
#pragma once

#include "gather_split.h"
#include "host.h"
#include "vec_math.h"

namespace vllm_sparse {
namespace {

inline size_t variance_floats(int64_t group) { return 2 * group * kBlock + 3 * group; }

// Squared lengths of a chunk's values, [kBlock] in fours.
template <class T>
inline void square_norms(const Chunk<T>& chunk, int64_t head_size, float* norms) {
  for (int n = 0; n < chunk.count; n += 4) {
    Vec acc[4] = {};
    for (int64_t d = 0; d < head_size; d += kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec x = load_row(chunk.values[n + i] + d);
        acc[i] += x * x;
      }
    }
    const Quad four = sums(acc[0], acc[1], acc[2], acc[3]);
    std::memcpy(norms + n, &four, sizeof(four));
  }
}

// The largest relative variance of a head's output that its sample shows: the sum over sampled rows
// of p^2 (1 - u) |v - out|^2, where p is a row's share of the estimate, against the mean square of
// the values that it attends to, the sum of p |v|^2. Against |out|^2, heads whose values cancel out,
// of which little is left in the model, would have to read nearly everything.
template <class T>
float relative_variance(const Host& h, const Gather& a, const GatherItem& item, float* scratch) {
  float* dots = scratch;  // [G, 64]
  float* along = dots + a.group * kBlock;
  float* variance = along + a.group * kBlock;  // [G]
  float* norms = variance + a.group;           // [G]
  float* squares = norms + a.group;            // [G]
  for (int64_t g = 0; g < a.group; ++g) {
    variance[g] = squares[g] = 0.0f;
    Vec sum = {};
    for (int64_t d = 0; d < a.head_size; d += kLanes) {
      const Vec x = load(item.out + g * a.head_size + d);
      sum += x * x;
    }
    norms[g] = horizontal_sum(sum);
  }
  Chunk<T> chunk;
  for (int64_t first = 0; first < item.count; first += kBlock) {
    chunk.find(item.view, item.rows, first, item.count);
    for_heads(static_cast<int>(a.group), [&](int g, auto heads) {
      decode_score<heads>(item.q + g * a.head_size, chunk.keys, chunk.count, a.head_size,
                          dots + g * kBlock, [](int) {});
      decode_score<heads>(item.out + g * a.head_size, chunk.values, chunk.count, a.head_size,
                          along + g * kBlock, [](int) {});
    });
    float log_prob[kBlock], of_key[kBlock], of_value[kBlock], norm[kBlock];
    square_norms(chunk, a.head_size, norm);
    std::memcpy(log_prob, item.log_prob + first, chunk.count * sizeof(float));
    for (int n = 0; n < chunk.count; ++n) {
      const bool scaled = std::is_same<T, Int8>::value;
      of_key[n] = scaled ? row_scales(item.view, chunk.rows[n])[0] : 1.0f;
      of_value[n] = scaled ? row_scales(item.view, chunk.rows[n])[1] : 1.0f;
    }
    // What is behind the last row weighs nothing.
    for (int n = chunk.count; n < kBlock; ++n) {
      log_prob[n] = of_key[n] = of_value[n] = norm[n] = 0.0f;
    }
    for (int64_t g = 0; g < a.group; ++g) {
      float* dot = dots + g * kBlock;
      for (int n = chunk.count; n < kBlock; ++n) dot[n] = along[g * kBlock + n] = 0.0f;
      Vec off = {}, square = {};
      for (int n = 0; n < kBlock; n += kLanes) {
        const Vec lp = load(log_prob + n), scale = load(of_value + n);
        const Vec p = exp(load(dot + n) * load(of_key + n) * h.scale - lp - item.lse[g]);
        const Vec length = load(norm + n) * scale * scale;
        const Vec away = length - 2.0f * load(along + g * kBlock + n) * scale + norms[g];
        const Vec left = 1.0f - exp(lp);
        off += p * p * left * max(away, Vec{});
        square += p * length;
      }
      variance[g] += horizontal_sum(off);
      squares[g] += horizontal_sum(square);
    }
  }
  float most = 0.0f;
  for (int64_t g = 0; g < a.group; ++g) {
    const float x = squares[g] > 0.0f ? variance[g] / squares[g] : 0.0f;
    most = x > most ? x : most;
  }
  return most;
}

}  // namespace
}  // namespace vllm_sparse
