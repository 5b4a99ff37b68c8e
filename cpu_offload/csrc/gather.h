// Attention over chosen rows of a context in host memory: what the C interface hands to the
// kernels. Mirrored field by field in cpu_offload/native.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "host.h"

namespace vllm_sparse {

constexpr int64_t kInt8 = 3;  // after the DType of kernels/csrc/attention.h

// The rows of one KV head, each a key and its value. A context is cut into segments of 2^shift
// rows, which lie anywhere in one buffer: row r is at
// rows + segments[r >> shift] + (r & (2^shift - 1)) * row_bytes.
// All in bytes and 64 bits wide: a store may hold more than 2^31 rows.
struct RowView {
  const char* rows;
  const char* scales;  // of int8 rows: (of K, of V) as two floats a row; else null
  const int64_t* segments;
  int64_t shift;
  int64_t row_bytes;
  int64_t length;  // rows of the context
};

// One query token's heads of one KV head, and the rows that they read.
struct GatherItem {
  RowView view;
  const float* q;         // [G, D]
  const int64_t* rows;    // [count] in any order; null: all rows of the context
  const float* log_prob;  // [count], taken off the logits; null: zeros
  int64_t count;
  float* out;  // [G, D]
  float* lse;  // [G]
};

struct Gather {
  int64_t dtype, head_size, group;
  bool bf16_queries;  // every query is a bfloat16 number
  float scale;
};

// All items of a call, [T, kv_heads, each] of them in order, laid out evenly: item i is of KV head
// i / each % kv_heads. Not as a table: making one in Python took 0.07 ms a call, and 0.25 ms on cold
// caches.
struct GatherCall {
  int64_t dtype, head_size, group, num_items, kv_heads, each;
  RowView view;                        // of KV head 0
  int64_t head_bytes, head_scale_bytes;  // from a KV head's rows, and scales, to the next one's
  const float* q;                      // [items, G, D]
  const int64_t* rows;                 // [items, rows_stride]; null: all rows
  int64_t rows_stride;
  const float* log_prob;  // [items, log_prob_stride]; null: zeros
  int64_t log_prob_stride;
  const int64_t* counts;  // [items]
  float* out;             // [items, G, D]
  float* lse;             // [items, G]
  float scale;
};

struct GatherSplit {
  const GatherItem* item;
  int64_t first, last;  // of the item's rows
  float* out;           // [G, D]
  float* lse;           // [G]
};

// Finds the hash codes of a query, and the rows that share at least two buckets with it.
struct LshSegment {
  const uint16_t* ids;      // [Hkv, L, 2^shift], the rows of each table by bucket
  const uint32_t* offsets;  // [Hkv, L, 2^K + 1], where each bucket begins
  const uint16_t* recent;   // [Hkv, L, recent_stride], codes of the rows not in the tables yet
  const float* centre;      // [Hkv, D], what the keys were centred by
  int64_t built, length, recent_stride;
};

struct LshItem {
  RowView view;
  const float* q;  // [G, D]
  const LshSegment* segments;
  int64_t kv_head;
  int64_t* rows;    // [capacity], ascending
  float* log_prob;  // [capacity]
  float* along;     // [capacity], how far each key, centred, goes along the queries' mean direction
  int64_t capacity;
  int64_t count;  // written: rows found, more than capacity where they did not fit
};

struct Lsh {
  int64_t dtype, head_size, group, num_items, bits, tables;
  const float* directions;     // [D, L * K]
  const float* log_inclusion;  // ln u at kInclusionSteps + 1 cosines from -1 to 1
  LshItem* items;
};

constexpr int kInclusionSteps = 4096;

// Logits of every row: [G, length].
struct ScoreItem {
  RowView view;
  const float* q;  // [G, D]
  float* scores;   // [G, length]
};

struct Score {
  int64_t dtype, head_size, group, num_items;
  float scale;
  const ScoreItem* items;
};

// int8 rows in pages of one layer of a host store, as floats of `dtype`.
struct Unpack {
  const char* part;  // of the layer; a page of it is part_bytes
  int64_t part_bytes, scales_at;
  const int64_t* pages;
  int64_t num_pages, rows, head_size, dtype;  // rows: of a page, all KV heads together
  void* out;                                  // [num_pages, rows, 2, D]
};

// The kernels of one instruction set. Scratch is counted in floats.
struct GatherKernels {
  const char* name;
  size_t (*gather_scratch)(const Gather&);
  // False where a row is none of the context: no such row was read.
  bool (*gather)(const Gather&, const GatherSplit&, float* scratch);
  size_t (*lsh_scratch)(const Lsh&);
  void (*lsh)(const Lsh&, LshItem&, float* scratch);
  size_t (*score_scratch)(const Score&);
  void (*score)(const Score&, const ScoreItem&, int64_t first, int64_t last, float* scratch);
  float (*read)(const char* from, int64_t bytes);  // sums up memory, for comparison
  size_t (*attend_scratch)(const Host&, int64_t rows);  // of an item of at most so many rows
  void (*attend)(const Host&, HostItem&, float* scratch);
  size_t (*append_scratch)(const Host&);
  void (*append)(const Host&, const HostAppend&, const HostPiece&, float* scratch);
  void (*unpack)(const Unpack&, int64_t page, int64_t first, int64_t last);
};

// Those that this process uses.
const GatherKernels* offload_kernels();

const GatherKernels* gather_generic();
#if defined(__x86_64__)
const GatherKernels* gather_avx2();
const GatherKernels* gather_avx512();
const GatherKernels* gather_avx512_bf16();
#endif

}  // namespace vllm_sparse
