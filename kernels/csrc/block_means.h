// Mean key of each block of one sequence.
#pragma once

#include "rows.h"
#include "vec.h"

namespace vllm_sparse {
namespace {

template <class T>
void block_means(const BlockMeans& a, int64_t index) {
  const int64_t blocks = (a.seq_len + kBlock - 1) / kBlock;
  const int64_t first = index % blocks * kBlock, head_size = a.head_size;
  const int count = static_cast<int>(a.seq_len - first < kBlock ? a.seq_len - first : kBlock);
  int64_t position[kBlock];
  const T* keys[kBlock];
  const T* unused[kBlock];
  for (int n = 0; n < count; ++n) position[n] = first + n;
  Rows<T>(a.kv, 0, a.heads[index / blocks]).find(position, count, keys, unused);
  float* mean = a.means + index * head_size;
  // Row by row, as they lie: down the columns of queries 4 KiB apart it took twice as long.
  const float share = 1.0f / static_cast<float>(count);
  constexpr int64_t kAtOnce = 8 * kLanes;
  constexpr int kRowsAhead = 16;
  for (int64_t begin = 0; begin < head_size; begin += kAtOnce) {
    const int64_t left = head_size - begin;
    if (left >= kAtOnce) {
      Vec sum[8] = {};
      for (int n = 0; n < count; ++n) {
        if (n + kRowsAhead < count) {
          const char* ahead = reinterpret_cast<const char*>(keys[n + kRowsAhead] + begin);
          for (size_t b = 0; b < kAtOnce * sizeof(T); b += 64) __builtin_prefetch(ahead + b, 0, 0);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[i] += load_row(keys[n] + begin + i * kLanes);
      }
      for (int i = 0; i < 8; ++i) store(mean + begin + i * kLanes, sum[i] * share);
      continue;
    }
    for (int64_t d = begin; d < head_size; d += kLanes) {
      Vec sum = Vec{};
      for (int n = 0; n < count; ++n) sum += load_row(keys[n] + d);
      store(mean + d, sum * share);
    }
  }
}

}  // namespace
}  // namespace vllm_sparse
