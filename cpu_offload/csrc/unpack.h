// int8 rows of a host store as the numbers that they stand for.
#pragma once

#include "gather.h"
#include "int8_row.h"

namespace vllm_sparse {
namespace {

template <class T>
void unpack_rows(const Unpack& a, int64_t page, int64_t first, int64_t last) {
  const char* part = a.part + a.pages[page] * a.part_bytes;
  const Int8* from = reinterpret_cast<const Int8*>(part) + 2 * first * a.head_size;
  const float* scales = reinterpret_cast<const float*>(part + a.scales_at);
  T* to = static_cast<T*>(a.out) + 2 * (page * a.rows + first) * a.head_size;
  for (int64_t n = 2 * first; n < 2 * last; ++n, from += a.head_size, to += a.head_size) {
    for (int64_t d = 0; d < a.head_size; d += kLanes) {
      store_row(to + d, load_row(from + d) * scales[n]);
    }
  }
}

}  // namespace
}  // namespace vllm_sparse
