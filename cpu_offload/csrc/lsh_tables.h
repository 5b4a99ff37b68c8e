// Hash tables of a segment's keys: for each table the rows sorted by bucket, and where each bucket
// begins (compressed sparse rows, 2 bytes a row and table).
#pragma once

#include "gather.h"

namespace vllm_sparse {

struct LshTables {
  uint16_t* ids;            // [tables, capacity]
  uint32_t* offsets;        // [tables, 2^bits + 1]
  const uint16_t* recent;   // [tables, recent_stride], codes of the rows to enter
  int64_t tables;           // of all KV heads
  int64_t bits, capacity, recent_stride;
  int64_t built, count;     // rows in the tables, rows to enter after them
};

// Enters the rows built .. built + count - 1 into one table. Takes one pass over the table.
void lsh_enter(const LshTables& a, int64_t table, uint32_t* scratch);

}  // namespace vllm_sparse
