// The softmax of decode in its three modes: one head's scores of 64 keys at a time. What the modes
// mean and why these limits: kernels/softmax_modes.py, which holds the same numbers.
#pragma once

#include <cmath>

#include "lane_sums.h"

namespace vllm_sparse {
namespace {

constexpr float kUnifiedHigh = 48.0f;
constexpr float kUnifiedLow = -48.0f;
constexpr float kLazyGrowth = 5.5451774f;  // 8 ln 2

// Turns one head's 64 scores into probabilities against a base that follows their maximum when
// that has grown by over `growth`: 0 is the online softmax.
inline void decode_softmax_step(float* scores, float* base, float* sum, float* out,
                                int64_t head_size, float growth = 0.0f) {
  Vec highest = load(scores);
  for (int n = kLanes; n < kBlock; n += kLanes) highest = max(highest, load(scores + n));
  const float high = horizontal_max(highest);
  if (high > *base + growth) {
    const float shrink = std::exp(*base - high);
    *sum *= shrink;
    for (int64_t d = 0; d < head_size; ++d) out[d] *= shrink;
    *base = high;
  }
  const float subtracted = *base == -kInf ? 0.0f : *base;
  Vec total = Vec{};
  for (int n = 0; n < kBlock; n += kLanes) {
    const Vec p = exp(load(scores + n) - subtracted);
    store(scores + n, p);
    total += p;
  }
  *sum += horizontal_sum(total);
}

// Sums of one head against its constant phi, lane by lane until the end.
struct UnifiedSums {
  float highest[kLanes];
  float sum[kLanes];

  void clear() {
    for (int i = 0; i < kLanes; ++i) {
      highest[i] = -kInf;
      sum[i] = 0.0f;
    }
  }
  float top() const { return horizontal_max(load(highest)); }
  float total() const { return horizontal_sum(load(sum)); }
};

// Turns one head's 64 scores into exp(score - phi); what lies too high is cut, and seen at the end.
inline void unified_softmax_step(float* scores, float phi, UnifiedSums* sums) {
  Vec highest = load(sums->highest), total = load(sums->sum);
  const Vec limit = splat(kUnifiedHigh);
  for (int n = 0; n < kBlock; n += kLanes) {
    const Vec score = load(scores + n);
    highest = max(highest, score);
    const Vec z = score - phi;
    const Vec p = exp(select(z < limit, z, limit));
    store(scores + n, p);
    total += p;
  }
  store(sums->highest, highest);
  store(sums->sum, total);
}

// Whether a row with this highest score and this sum of exp(score - phi) has lost nothing; written
// so that a NaN does not pass.
inline bool stays_in_window(float highest, float phi, float sum) {
  return highest - phi <= kUnifiedHigh && sum >= std::exp(kUnifiedLow);
}

}  // namespace
}  // namespace vllm_sparse
