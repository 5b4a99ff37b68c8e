// Which rows are read, given what each is expected to weigh.
#pragma once

#include <cmath>
#include <cstring>

#include "decode_split.h"
#include "vec_math.h"

namespace vllm_sparse {
namespace {

constexpr int kStep = 16;  // rows that are looked at together
constexpr int kSteps = 4;  // steps that are summed up together

// Weights of rows, not negative, and of steps of them, so that most rows are passed over by a step.
struct Weights {
  float* each;  // [count], rounded up to kSteps steps
  float* sums;  // [steps], rounded up to vectors
  float* tops;  // [steps], rounded up to vectors
  int64_t count;  // rows, whole steps

  static int64_t rows(int64_t count) {
    constexpr int kWhole = kStep * kSteps;
    return (count + kWhole - 1) / kWhole * kWhole;
  }
  static int64_t steps(int64_t count) { return (count / kStep + kStep - 1) / kStep * kStep; }

  // To be called once rows begin .. end - 1 have their weights: the others have none.
  void settle(int64_t begin, int64_t end) const {
    constexpr int kVecsOfStep = kStep / kLanes;
    for (int64_t i = 0; i < begin; ++i) each[i] = 0.0f;
    for (int64_t i = end; i < rows(count); ++i) each[i] = 0.0f;
    for (int64_t s = rows(count) / kStep; s < steps(count); ++s) sums[s] = tops[s] = 0.0f;
    for (int64_t i = 0; i < rows(count); i += kSteps * kStep) {
      Vec sum[kSteps], top[kSteps];
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s) {
        sum[s] = top[s] = load(each + i + s * kStep);
        for (int j = 1; j < kVecsOfStep; ++j) {
          const Vec x = load(each + i + s * kStep + j * kLanes);
          sum[s] += x;
          top[s] = max(x, top[s]);
        }
      }
      const Quad four = vllm_sparse::sums(sum[0], sum[1], sum[2], sum[3]);
      const Quad highest = maxima(top[0], top[1], top[2], top[3]);
      std::memcpy(sums + i / kStep, &four, sizeof(four));
      std::memcpy(tops + i / kStep, &highest, sizeof(highest));
    }
  }
};

// Rows [count], ascending, and ln of the probability with which each was chosen.
struct Chosen {
  int64_t* rows;
  float* log_prob;
  int64_t count;

  // `value`: the probability, until log_probabilities makes logarithms of all.
  void enter(int64_t row, float value) {
    rows[count] = row;
    log_prob[count++] = value;
  }
};

// The factor c at which min(1, c * w) add up to `most`, for weights that do not add up to nothing.
inline float share_out(const Weights& w, float most) {
  const int64_t steps = Weights::steps(w.count);
  float c = 0.0f, certain_before = -1.0f;
  float bound = kInf;  // weights from here on are chosen for certain
  for (int round = 0; round < 12; ++round) {
    Vec rest = {};
    float part = 0.0f, sure = 0.0f;
    const Vec at = splat(bound);
    for (int64_t s = 0; s < steps; s += kLanes) {
      const IVec below = load(w.tops + s) < at;
      rest += select(below, load(w.sums + s), Vec{});
      if (!any(~below)) continue;
      for (int64_t i = s; i < s + kLanes; ++i) {
        if (w.tops[i] < bound) continue;
        Vec some = {}, certain = {};
        for (int j = 0; j < kStep; j += kLanes) {
          const Vec x = load(w.each + i * kStep + j);
          some += select(x < at, x, Vec{});
          certain += select(x < at, Vec{}, splat(1.0f));
        }
        part += horizontal_sum(some), sure += horizontal_sum(certain);
      }
    }
    const float sum = part + horizontal_sum(rest);
    if (sure == certain_before || sure >= most || sum <= 0.0f) break;
    certain_before = sure;
    c = (most - sure) / sum;
    bound = 1.0f / c;
  }
  return c;
}

// Bits of the rows of a step, x [kStep], for which test(numbers) holds.
template <class Test>
inline uint32_t rows_of_step(const float* x, const Test& test) {
  uint32_t bits = 0;
  for (int j = 0; j < kStep; j += kLanes) bits |= lanes_of(test(load(x + j))) << j;
  return bits;
}

// Every row with probability min(1, c * w), by one number 0 < u <= 1 for all: as many as expected,
// up to one. Weights are of rows first, first + 1, ... Enters probabilities.
inline void choose(const Weights& w, float c, float u, int64_t first, int64_t most,
                   Chosen* chosen) {
  double sum = 0.0, next = u;  // a row is chosen where the sum of the chances reaches the next
  for (int64_t s = 0; s < w.count / kStep; ++s) {
    const double all = w.sums[s] * c;
    if (w.tops[s] * c < 1.0f && sum + all < next) {
      sum += all;
      continue;
    }
    alignas(64) float chance[kStep], drawn[kStep], sums[kStep];
    for (int j = 0; j < kStep; j += kLanes) {
      const Vec x = load(w.each + s * kStep + j) * c;
      store(chance + j, x < 1.0f ? x : splat(1.0f));
      store(drawn + j, select(x < 1.0f, x, Vec{}));
    }
    running_sums(drawn, sums);
    uint32_t chosen_here = rows_of_step(chance, [](Vec x) { return x >= 1.0f; });
    uint32_t left = rows_of_step(drawn, [](Vec x) { return x > 0.0f; });
    while (left != 0) {
      const Vec need = splat(static_cast<float>(next - sum));
      left &= rows_of_step(sums, [&](Vec x) { return x >= need; });
      if (left == 0) break;
      chosen_here |= left & -left;
      left &= left - 1;
      next += 1.0;
    }
    sum += sums[kStep - 1];
    for (; chosen_here != 0 && chosen->count < most; chosen_here &= chosen_here - 1) {
      const int j = __builtin_ctz(chosen_here);
      chosen->enter(first + s * kStep + j, chance[j]);
    }
  }
}

// The largest number that `most` of n numbers are not below, none of them negative.
inline float nth_largest(const float* x, int64_t n, int64_t most) {
  uint32_t bound = 0;  // their bits are in their order
  for (int bit = 30; bit >= 0; --bit) {
    const float at = bits_to_float(bound | uint32_t{1} << bit);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += x[i] >= at;
    if (count >= most) bound |= uint32_t{1} << bit;
  }
  return bits_to_float(bound);
}

// The `most` rows of the largest weights; of equal ones the first. Enters probabilities.
// `some`: [w.count] scratch.
inline void choose_largest(const Weights& w, int64_t first, int64_t most, float* some,
                           Chosen* chosen) {
  // As many rows as there are steps weigh as much as the tops of those: few others are looked at.
  const int64_t steps = w.count / kStep;
  const float least = most <= steps ? nth_largest(w.tops, steps, most) : 0.0f;
  int64_t count = 0;
  for (int64_t s = 0; s < steps; ++s) {
    if (w.tops[s] < least) continue;
    for (int j = 0; j < kStep; ++j) {
      some[count] = w.each[s * kStep + j];
      count += some[count] >= least;
    }
  }
  const float at = nth_largest(some, count, most);
  int64_t above = 0;
  for (int64_t i = 0; i < count; ++i) above += some[i] > at;
  int64_t equal = most - above;
  for (int64_t s = 0; s < steps && at > 0.0f; ++s) {
    if (w.tops[s] < at) continue;
    for (int64_t i = s * kStep; i < (s + 1) * kStep; ++i) {
      if (w.each[i] > at || (w.each[i] == at && equal-- > 0)) chosen->enter(first + i, 1.0f);
    }
  }
}

}  // namespace
}  // namespace vllm_sparse
