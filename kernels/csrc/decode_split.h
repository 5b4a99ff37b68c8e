// Decode: the query heads of one KV head over a range of one sequence's keys, and the merge of
// such ranges. Lanes lie along the head size; each key and value is read once for all the heads.
#pragma once

#include <cmath>

#include "rows.h"
#include "vec.h"

namespace vllm_sparse {
namespace {

inline float horizontal_sum(Vec v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width >= 4; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// scores[g, n] = q[g] . k for `kGroup` query heads and one key.
template <int kGroup, class T>
inline void decode_score(const float* q, const T* k, int64_t head_size, float* scores) {
  Vec acc[kGroup] = {};
  for (int64_t d = 0; d < head_size; d += kLanes) {
    const Vec x = load_row(k + d);
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) acc[g] += load(q + g * head_size + d) * x;
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroup; ++g) scores[g * kBlock] = horizontal_sum(acc[g]);
}

// out[g, :] += sum_n scores[g, n] * values[n] for `kGroup` query heads.
template <int kGroup, class T>
inline void decode_accumulate(const float* scores, const T* const* values, int count,
                              int64_t head_size, float* out) {
  for (int64_t d = 0; d < head_size; d += kStrip) {
    constexpr int kSteps = kStrip / kLanes;
    Vec acc[kGroup][kSteps];
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int j = 0; j < kSteps; ++j) acc[g][j] = load(out + g * head_size + d + j * kLanes);
    for (int n = 0; n < count; ++n) {
#pragma GCC unroll 8
      for (int j = 0; j < kSteps; ++j) {
        const Vec x = load_row(values[n] + d + j * kLanes);
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g) acc[g][j] += scores[g * kBlock + n] * x;
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int j = 0; j < kSteps; ++j) store(out + g * head_size + d + j * kLanes, acc[g][j]);
  }
}

// Turns one head's 64 scores into probabilities against its running maximum.
inline void decode_softmax_step(float* scores, float* top, float* sum, float* out,
                                int64_t head_size) {
  Vec highest = load(scores);
  for (int n = kLanes; n < kBlock; n += kLanes) highest = max(highest, load(scores + n));
  float new_top = *top;
  for (int i = 0; i < kLanes; ++i) new_top = highest[i] > new_top ? highest[i] : new_top;
  const float base = new_top == -kInf ? 0.0f : new_top;
  Vec total = Vec{};
  for (int n = 0; n < kBlock; n += kLanes) {
    const Vec p = exp(load(scores + n) - base);
    store(scores + n, p);
    total += p;
  }
  if (new_top > *top) {
    const float shrink = std::exp(*top - base);
    *sum *= shrink;
    for (int64_t d = 0; d < head_size; ++d) out[d] *= shrink;
    *top = new_top;
  }
  *sum += horizontal_sum(total);
}

// Partial attention of the G query heads of a KV head over keys [first_key, last_key).
template <class T>
void decode_split(const Decode& a, const SplitWork& w, float* scratch) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const int group = static_cast<int>(shape.num_heads / shape.num_kv_heads);
  const Rows<T> rows(a.kv, w.seq, w.kv_head);
  float* q = scratch;                  // [G, D], scaled
  float* scores = q + group * head_size;  // [G, 64]
  float* top = scores + group * kBlock;   // [G]
  float* sum = top + group;               // [G]
  for (int g = 0; g < group; ++g) {
    const T* from = static_cast<const T*>(a.q) + w.seq * a.q_row_stride +
                    (w.kv_head * group + g) * a.q_head_stride;
    for (int64_t d = 0; d < head_size; ++d) q[g * head_size + d] = to_float(from[d]) * shape.scale;
    top[g] = -kInf;
    sum[g] = 0.0f;
  }
  std::memset(w.out, 0, group * head_size * sizeof(float));

  for (int64_t first = w.first_key; first < w.last_key; first += kBlock) {
    const int count = static_cast<int>(w.last_key - first < kBlock ? w.last_key - first : kBlock);
    const T* values[kBlock];
    for (int n = 0; n < count; ++n) {
      const T* k = rows.key(first + n);
      values[n] = rows.value(first + n);
      int g = 0;
      for (; g + 4 <= group; g += 4) {
        decode_score<4>(q + g * head_size, k, head_size, scores + g * kBlock + n);
      }
      for (; g < group; ++g) {
        decode_score<1>(q + g * head_size, k, head_size, scores + g * kBlock + n);
      }
    }
    for (int g = 0; g < group; ++g) {
      for (int n = count; n < kBlock; ++n) scores[g * kBlock + n] = -kInf;
      decode_softmax_step(scores + g * kBlock, top + g, sum + g, w.out + g * head_size, head_size);
    }
    int g = 0;
    for (; g + 4 <= group; g += 4) {
      decode_accumulate<4>(scores + g * kBlock, values, count, head_size, w.out + g * head_size);
    }
    for (; g < group; ++g) {
      decode_accumulate<1>(scores + g * kBlock, values, count, head_size, w.out + g * head_size);
    }
  }
  for (int g = 0; g < group; ++g) {
    const float inverse = sum[g] > 0.0f ? 1.0f / sum[g] : 0.0f;
    for (int64_t d = 0; d < head_size; ++d) w.out[g * head_size + d] *= inverse;
    w.lse[g] = sum[g] > 0.0f ? top[g] + std::log(sum[g]) : -kInf;
  }
}

template <class T>
void decode_merge(const Decode& a, int64_t seq, int64_t kv_head, const float* parts_out,
                  const float* parts_lse, int64_t parts) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    float top = -kInf;
    for (int64_t p = 0; p < parts; ++p) top = std::fmax(top, parts_lse[p * group + g]);
    const float base = top == -kInf ? 0.0f : top;
    float sum = 0.0f;
    for (int64_t p = 0; p < parts; ++p) sum += std::exp(parts_lse[p * group + g] - base);
    T* out = static_cast<T*>(a.out) + seq * a.out_row_stride + head * a.out_head_stride;
    for (int64_t d = 0; d < head_size; ++d) {
      float value = 0.0f;
      for (int64_t p = 0; p < parts; ++p) {
        value += std::exp(parts_lse[p * group + g] - base) * parts_out[(p * group + g) * head_size + d];
      }
      from_float(sum > 0.0f ? value / sum : 0.0f, out + d);
    }
    a.lse[seq * shape.num_heads + head] = sum > 0.0f ? base + std::log(sum) : -kInf;
  }
}

}  // namespace
}  // namespace vllm_sparse
