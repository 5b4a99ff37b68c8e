// Where the rows of K and V of one sequence lie in the pages.
#pragma once

#include "attention.h"

namespace vllm_sparse {
namespace {

// Fetches memory line by line into the second-level cache. GCC 12 takes a function of nothing but
// prefetches for one without effect and leaves calls of it out: the empty asm is an effect.
__attribute__((always_inline)) inline void fetch_lines(const void* from, int64_t bytes) {
  asm volatile("");
  const char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// Finds the rows of one sequence and KV head in the pages.
template <class T>
struct Rows {
  const T* k;
  const T* v;
  const PagedKV& kv;
  const int32_t* table;

  Rows(const PagedKV& kv, int64_t seq, int64_t kv_head)
      : k(static_cast<const T*>(kv.k) + kv_head * kv.k_head_stride),
        v(static_cast<const T*>(kv.v) + kv_head * kv.v_head_stride),
        kv(kv),
        table(kv.block_table + seq * kv.table_stride) {}

  // Rows k[n], v[n] of `count` positions. Neighbours in a page are found without a division:
  // with one per row, finding the rows took as long as decoding them in bf16.
  void find(const int64_t* positions, int count, const T** keys, const T** values) const {
    int64_t page = 0, offset = kv.page_size;
    for (int n = 0; n < count; ++n) {
      const bool follows = n > 0 && positions[n] == positions[n - 1] + 1;
      if (follows && ++offset < kv.page_size) {
        keys[n] = keys[n - 1] + kv.k_row_stride;
        values[n] = values[n - 1] + kv.v_row_stride;
        continue;
      }
      page = table[positions[n] / kv.page_size];
      offset = positions[n] % kv.page_size;
      keys[n] = k + page * kv.k_page_stride + offset * kv.k_row_stride;
      values[n] = v + page * kv.v_page_stride + offset * kv.v_row_stride;
    }
  }
};

}  // namespace
}  // namespace vllm_sparse
