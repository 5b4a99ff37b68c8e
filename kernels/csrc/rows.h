// Where the rows of K and V of one sequence lie in the pages.
#pragma once

#include "attention.h"

namespace vllm_sparse {
namespace {

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

  const T* key(int64_t position) const {
    const int64_t page = table[position / kv.page_size];
    return k + page * kv.k_page_stride + position % kv.page_size * kv.k_row_stride;
  }
  const T* value(int64_t position) const {
    const int64_t page = table[position / kv.page_size];
    return v + page * kv.v_page_stride + position % kv.page_size * kv.v_row_stride;
  }
};

}  // namespace
}  // namespace vllm_sparse
