// From a mask of blocks and a table of columns to the lists that prefill reads.
#pragma once

#include <cstdint>

namespace vllm_sparse {

struct IndexLists {
  const uint8_t* mask;     // [rows, nb], rows being tiles x heads
  const int32_t* table;    // [rows, M] columns, ascending where not negative
  const int64_t* last_key;  // [tiles]
  int64_t tiles, heads, blocks, width;
  // Both of [rows + 1]: counted first, and summed; with blocks and columns, read.
  int32_t* block_offsets;
  int32_t* column_offsets;
  int32_t* block_list;  // null: count only
  int32_t* column_list;
};

// One tile: counts what its rows read, or writes it. Blocks of the future are left out, and so
// are columns of the future and those within the row's blocks.
inline void index_lists(const IndexLists& a, int64_t tile) {
  constexpr int kKeys = 64;
  const int64_t last_key = a.last_key[tile], last_block = last_key / kKeys;
  for (int64_t row = tile * a.heads; row < (tile + 1) * a.heads; ++row) {
    const uint8_t* mask = a.mask + row * a.blocks;
    const int32_t* table = a.table + row * a.width;
    int32_t* blocks = a.block_list ? a.block_list + a.block_offsets[row] : nullptr;
    int32_t* columns = a.block_list ? a.column_list + a.column_offsets[row] : nullptr;
    int32_t found = 0;
    for (int64_t b = 0; b <= last_block && b < a.blocks; ++b) {
      if (!mask[b]) continue;
      if (blocks) blocks[found] = static_cast<int32_t>(b);
      ++found;
    }
    if (!blocks) a.block_offsets[row + 1] = found;
    found = 0;
    for (int64_t m = 0; m < a.width; ++m) {
      const int32_t key = table[m];
      if (key < 0 || key > last_key || mask[key / kKeys]) continue;
      if (columns) columns[found] = key;
      ++found;
    }
    if (!blocks) a.column_offsets[row + 1] = found;
  }
}

}  // namespace vllm_sparse
