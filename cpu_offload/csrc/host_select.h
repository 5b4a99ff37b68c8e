// Which rows are read, given what each is expected to weigh: floats [n], n a multiple of 16.
#pragma once

#include <cmath>
#include <cstring>

#include "vec.h"

namespace vllm_sparse {
namespace {

constexpr int kStep = 16;  // rows that are looked at together

// Rows [count], ascending, and ln of the probability with which each was chosen.
struct Chosen {
  int64_t* rows;
  float* log_prob;
  int64_t count;

  void enter(int64_t row, float logarithm) {
    rows[count] = row;
    log_prob[count++] = logarithm;
  }
};

// The factor c at which min(1, c * w) add up to `most`, for weights that do not add up to nothing.
inline float share_out(const float* w, int64_t n, float most) {
  float c = 0.0f, certain_before = -1.0f;
  float bound = kInf;  // weights from here on are chosen for certain
  for (int round = 0; round < 12; ++round) {
    Vec rest = {}, certain = {};
    const Vec at = splat(bound);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec x = load(w + i);
      rest += select(x < at, x, Vec{});
      certain += select(x < at, Vec{}, splat(1.0f));
    }
    float sum = 0.0f, sure = 0.0f;
    for (int j = 0; j < kLanes; ++j) sum += rest[j], sure += certain[j];
    if (sure == certain_before || sure >= most || sum <= 0.0f) break;
    certain_before = sure;
    c = (most - sure) / sum;
    bound = 1.0f / c;
  }
  return c;
}

// Every row with probability min(1, c * w), by one number 0 < u <= 1 for all: as many as expected,
// up to one. Weights are of rows first, first + 1, ...
inline void choose(const float* w, int64_t n, float c, float u, int64_t first, int64_t most,
                   Chosen* chosen) {
  double sum = 0.0, next = u;
  for (int64_t i = 0; i < n; i += kStep) {
    float all = 0.0f, highest = 0.0f;
    for (int j = 0; j < kStep; ++j) {
      const float x = w[i + j] * c;
      all += x;
      highest = x > highest ? x : highest;
    }
    if (highest < 1.0f && sum + all < next) {
      sum += all;
      continue;
    }
    for (int j = 0; j < kStep && chosen->count < most; ++j) {
      const float x = w[i + j] * c;
      if (x >= 1.0f) {
        chosen->enter(first + i + j, 0.0f);
      } else {
        sum += x;
        if (sum < next || !(x > 0.0f)) continue;
        chosen->enter(first + i + j, std::log(x));
        next += 1.0;
      }
    }
  }
}

// The `most` rows of the largest weights; of equal ones the first.
inline void choose_largest(const float* w, int64_t n, int64_t first, int64_t most,
                           Chosen* chosen) {
  // Weights are not negative, so their bits are in their order: find those of the smallest.
  uint32_t bound = 0;
  for (int bit = 30; bit >= 0; --bit) {
    const float at = bits_to_float(bound | uint32_t{1} << bit);
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += w[i] >= at;
    if (count >= most) bound |= uint32_t{1} << bit;
  }
  const float at = bits_to_float(bound);
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += w[i] > at;
  int64_t equal = most - above;
  for (int64_t i = 0; i < n && at > 0.0f; ++i) {
    if (w[i] > at || (w[i] == at && equal-- > 0)) chosen->enter(first + i, 0.0f);
  }
}

}  // namespace
}  // namespace vllm_sparse
