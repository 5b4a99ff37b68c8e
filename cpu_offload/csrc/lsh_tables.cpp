#include "lsh_tables.h"

#include <cstring>

namespace vllm_sparse {

void lsh_enter(const LshTables& a, int64_t table, uint32_t* scratch) {
  const int64_t buckets = int64_t{1} << a.bits;
  uint16_t* ids = a.ids + table * a.capacity;
  uint32_t* offsets = a.offsets + table * (buckets + 1);
  const uint16_t* codes = a.recent + table * a.recent_stride;
  uint32_t* next = scratch;  // [buckets] rows to enter, then where the next of them goes
  std::memset(next, 0, buckets * sizeof(uint32_t));
  for (int64_t i = 0; i < a.count; ++i) ++next[codes[i]];
  // From the last bucket on, each moves up by the rows that enter the buckets before it.
  uint32_t shift = static_cast<uint32_t>(a.count), end = offsets[buckets];
  offsets[buckets] = end + shift;
  for (int64_t b = buckets - 1; b >= 0; --b) {
    const uint32_t begin = offsets[b];
    shift -= next[b];
    std::memmove(ids + begin + shift, ids + begin, (end - begin) * sizeof(uint16_t));
    next[b] = end + shift;
    offsets[b] = begin + shift;
    end = begin;
  }
  for (int64_t i = 0; i < a.count; ++i) ids[next[codes[i]]++] = static_cast<uint16_t>(a.built + i);
}

}  // namespace vllm_sparse
