// Online softmax of a query tile whose 64 queries lie in the lanes.
#pragma once

#include <cmath>

#include "selection.h"
#include "vec.h"

namespace vllm_sparse {
namespace {

// Scores and running results of one query tile of one head, in scratch memory.
struct SoftmaxTile {
  float* out;     // [D, 64], not normalised
  float* scores;  // [>= 64 keys, 64]
  float* top;     // [64] running maximum
  float* sum;     // [64] running denominator
  int64_t head_size;
  float scale;  // factor on the scores

  void clear() const {
    std::memset(out, 0, head_size * kTile * sizeof(float));
    std::memset(sum, 0, kTile * sizeof(float));
    for (int r = 0; r < kTile; ++r) top[r] = -kInf;
  }
};

// Hides keys[n] from the queries that stand before it. position[n] is relative to the first query.
inline void mask_causal(const SoftmaxTile& s, const int64_t* position, int count) {
  IVec lane0;
  for (int i = 0; i < kLanes; ++i) lane0[i] = i;
  for (int n = 0; n < count; ++n) {
    if (position[n] <= 0) continue;
    const int32_t p = static_cast<int32_t>(position[n]);
    for (int c = 0; c < kVectors; ++c) {
      float* score = s.scores + n * kTile + c * kLanes;
      const IVec sees = (lane0 + c * kLanes) >= p;
      store(score, select(sees, load(score), splat(-kInf)));
    }
  }
}

// Turns scores into probabilities against the running maximum, rescaling what came before. Of the
// lanes only the first `vectors` are looked at.
inline void softmax_step(const SoftmaxTile& s, int count, int vectors = kVectors) {
  for (int c = 0; c < vectors; ++c) {
    float* scores = s.scores + c * kLanes;
    Vec highest = load(scores);
    for (int n = 1; n < count; ++n) highest = max(highest, load(scores + n * kTile));
    const Vec before = load(s.top + c * kLanes);
    const Vec top = max(before, highest * s.scale);
    // A query that has seen nothing yet has top = -inf; subtracting 0 keeps its scores at -inf.
    const Vec base = select(top == -kInf, Vec{}, top);
    Vec sum = Vec{};
    for (int n = 0; n < count; ++n) {
      const Vec p = exp(load(scores + n * kTile) * s.scale - base);
      store(scores + n * kTile, p);
      sum += p;
    }
    Vec total = load(s.sum + c * kLanes);
    if (any(top > before)) {
      const Vec shrink = exp(before - base);
      total *= shrink;
      float* out = s.out + c * kLanes;
      for (int64_t d = 0; d < s.head_size; ++d) store(out + d * kTile, load(out + d * kTile) * shrink);
      store(s.top + c * kLanes, top);
    }
    store(s.sum + c * kLanes, total + sum);
  }
}

// Normalises the first lanes of a tile and writes them: lane i to out(i) [D] and *lse(i).
template <class Out, class Lse>
inline void write_lanes(const SoftmaxTile& s, int lanes, const Out& out, const Lse& lse) {
  for (int c = 0; c < lanes; c += kLanes) {
    const Vec sum = load(s.sum + c);
    const Vec inverse = select(sum > 0.0f, 1.0f / sum, Vec{});
    const int rows = lanes - c < kLanes ? lanes - c : kLanes;
    for (int64_t d = 0; d < s.head_size; d += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i) r[i] = load(s.out + (d + i) * kTile + c) * inverse;
      transpose(r);
      for (int i = 0; i < rows; ++i) store_row(out(c + i) + d, r[i]);
    }
  }
  for (int r = 0; r < lanes; ++r) {
    const float sum = s.sum[r];
    *lse(r) = sum > 0.0f ? s.top[r] + std::log(sum) : -kInf;
  }
}

// Normalises a tile and writes its rows of out and lse.
template <class T>
void write_tile(const Prefill& a, const SoftmaxTile& s, const TilePlace& place, int64_t head) {
  T* out = static_cast<T*>(a.out) + place.begin * a.out_row_stride + head * a.out_head_stride;
  write_lanes(
      s, place.rows, [&](int r) { return out + r * a.out_row_stride; },
      [&](int r) { return a.lse + (place.begin + r) * a.shape.num_heads + head; });
}

}  // namespace
}  // namespace vllm_sparse
