// Scores of up to 64 keys against 64 queries, which lie in the lanes. A step of the head size is one
// number, or a pair of them.
#pragma once

#include "pairs.h"

namespace vllm_sparse {
namespace {

constexpr int kBlockRest = kBlock % kKeys;
constexpr int kRest = kBlockRest > 0 ? kBlockRest : 1;
constexpr int kScoreRows = (kBlock + kKeys - 1) / kKeys * kKeys;  // the last group may be padded

// Rows to bring into the cache beside the scores of the block before. Without it a fifth of the
// time of prefill went into waiting for rows (measured at 16K keys, D = 128, fp32).
struct Ahead {
  const void* row[2 * kBlock];
  int count = 0;
  int next = 0;
  int step = 0;  // rows at a time
  int64_t bytes = 0;

  void fetch() {
    for (int i = 0; i < step && next < count; ++i, ++next) {
      const char* line = static_cast<const char*>(row[next]);
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(line + b, 0, 2);
    }
  }
};

// scores[i, ..] = sum_d rows[i][d] * q[d, ..] for kCount rows and kWidth vectors of queries.
template <int kCount, int kWidth, class Step>
inline void score_vectors(const float* q, const Step* const* rows, int64_t steps, float* scores) {
  Vec acc[kCount][kWidth] = {};
  for (int64_t d = 0; d < steps; ++d, q += kTile) {
    Vec x[kWidth];
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) x[j] = load(q + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) acc[i][j] = add_product(acc[i][j], x[j], rows[i][d]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) store(scores + i * kTile + j * kLanes, acc[i][j]);
}

// scores[n, :] = sum_d keys[n][d] * q[d, :] for n < count, rounded up to groups of kKeys rows
// (the caller repeats the last row's pointer there), and for the vectors first .. end - 1.
template <class Step>
inline void score(const float* q, const Step* const* keys, int count, int64_t steps, int first,
                  int end, float* scores, Ahead& ahead) {
  for (int n = 0; n < count; n += kKeys) {
    ahead.fetch();
    const Step* row[kKeys];
    for (int i = 0; i < kKeys; ++i) row[i] = keys[n + i];
    float* to = scores + n * kTile;
    // Of a whole block fewer than kKeys rows are left at its end: padded they are 3% more work.
    const bool rest = kBlockRest > 0 && count - n == kBlockRest;
    int c = first;
    for (; c + kVecs <= end; c += kVecs) {
      if (rest) {
        score_vectors<kRest, kVecs>(q + c * kLanes, row, steps, to + c * kLanes);
      } else {
        score_vectors<kKeys, kVecs>(q + c * kLanes, row, steps, to + c * kLanes);
      }
    }
    for (; c < end; ++c) {
      score_vectors<kKeys, 1>(q + c * kLanes, row, steps, to + c * kLanes);
    }
  }
}

// One vector of queries' scores of `count` keys.
inline void scale_scores(float* scores, int64_t count, float scale) {
  if (scale == 1.0f) return;
  for (int64_t n = 0; n < count; ++n) {
    store(scores + n * kTile, load(scores + n * kTile) * scale);
  }
}

}  // namespace
}  // namespace vllm_sparse
