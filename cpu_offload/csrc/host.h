// A host store of all layers of a worker, and attention over it, one token of many requests at a
// time. Mirrored field by field in cpu_offload/host.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_sparse {

enum HostSampler : int64_t { kExact = 0, kTopK = 1, kVAttention = 2, kLsh = 3 };

// Rows lie in pages of 2^shift. Page p of layer l is at parts + l * layer_bytes + p * part_bytes:
// rows [Hkv][2^shift][K, V][D], scales of int8 rows [Hkv][2^shift][K, V] from scales_at on, and
// what samplers know of the keys, [Hkv] times index_bytes, from index_at on (sketch.h).
struct Host {
  char* parts;
  const int32_t* table;  // [max_requests][max_pages] page numbers
  int64_t layers, layer_bytes, part_bytes, scales_at, index_at, index_bytes;
  int64_t dtype, head_size, kv_heads, group, shift, pages, max_requests, max_pages;
  int64_t sampler;
  int64_t rows;   // the most that an item reads; 0: by share and least
  int64_t least;  // rows that are read of any context
  int64_t bits, tables;  // of LSH
  float scale;    // of logits
  float share;    // of the rows that are read at first
  float even;     // share of the sample that is drawn without regard to expected weight
  float epsilon;  // relative error of a head's output; 0: not looked at
  float quantile;  // of the normal distribution that epsilon holds at
  const float* directions;     // [D, tables * bits]
  const float* log_inclusion;  // ln u at kInclusionSteps + 1 cosines from -1 to 1
};

namespace {

// Number `at` of a request's page numbers; -1 where that is no page's. The memory is shared, and what
// is written over it by mistake is not to be read through, or written through: read once, then looked
// at.
inline int64_t page_of(const Host& h, const int32_t* pages, int64_t at) {
  const int64_t page = __atomic_load_n(pages + at, __ATOMIC_RELAXED);
  return page >= 0 && page < h.pages ? page : -1;
}

}  // namespace

// One token's query heads of one KV head of a request.
struct HostItem {
  int64_t layer, kv_head, slot;
  int64_t first, last;  // rows that it attends to
  const float* q;       // [G, D]
  float* out;           // [G, D]
  float* lse;           // [G]
  int64_t rows_read;    // written; kLost: nothing else is
};

constexpr int64_t kLost = -1;  // what says where the rows lie was written over

// Rows to be kept: `count` jobs of rows of one request each, in one layer.
struct HostAppend {
  int64_t layer, count;
  const int64_t* jobs;  // [count][4]: slot, first row there, rows, first row of k and v
  int64_t dtype;        // of k and v
  const void* k;
  const void* v;
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride;  // elements
};

// Rows of one page and KV head of an append.
struct HostPiece {
  int64_t page, kv_head;
  int64_t row, count;  // within the page
  int64_t from;        // row of k and v
  const float* centre;  // to be taken over when the page is new; null: the mean of these rows
};

}  // namespace vllm_sparse
