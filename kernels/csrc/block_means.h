// Mean key of each block of one sequence, and mean query of each tile of a chunk.
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

// All heads of a row before the next rows: a row's heads lie together. Head by head, 4 KiB from row
// to row, it took twice as long; without fetching ahead into the second-level cache 1.5 times.
template <class T>
void tile_means(const TileMeans& a, int64_t tile) {
  constexpr int kRows = 4, kRowsAhead = 16;
  const int64_t tiles = (a.num_rows + kTile - 1) / kTile, head_size = a.head_size;
  const int64_t first = tile * kTile;
  const int64_t count = a.num_rows - first < kTile ? a.num_rows - first : kTile;
  const T* q = static_cast<const T*>(a.q) + first * a.q_row_stride;
  const Vec share = splat(1.0f / static_cast<float>(count));
  for (int64_t r = 0; r < count; r += kRows) {
    const int64_t left = count - r < kRows ? count - r : kRows;
    for (int64_t h = 0; h < a.num_heads; ++h) {
      const T* row = q + r * a.q_row_stride + a.heads[h] * a.q_head_stride;
      float* mean = a.means + (h * tiles + tile) * head_size;
      for (int64_t d = 0; d < head_size; d += kLanes) {
        Vec sum = r == 0 ? Vec{} : load(mean + d);
        if (left == kRows) {
          for (int i = 0; i < kRows && d * sizeof(T) % 64 == 0; ++i) {
            __builtin_prefetch(row + (i + kRowsAhead) * a.q_row_stride + d, 0, 2);
          }
          sum += (load_row(row + d) + load_row(row + a.q_row_stride + d)) +
                 (load_row(row + 2 * a.q_row_stride + d) + load_row(row + 3 * a.q_row_stride + d));
        } else {
          for (int64_t i = 0; i < left; ++i) sum += load_row(row + i * a.q_row_stride + d);
        }
        store(mean + d, r + left == count ? sum * share : sum);
      }
    }
  }
}

}  // namespace
}  // namespace vllm_sparse
