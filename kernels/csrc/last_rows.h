// The cheapest union of blocks and single columns that covers every row of one tile. The meaning
// stands in kernels/pattern_reference.py. Plain loops: one instruction set does for all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "heaviest.h"

namespace vllm_sparse {

struct UnionSearch {
  const float* blocks;       // [h, R, nb]
  const uint8_t* base;       // [nb]
  const int64_t* columns;    // [h, M]
  const float* column_mass;  // [h, R, M]
  const float* coverage;     // [h]
  const int64_t* counts;     // ascending, how many columns are tried
  int64_t heads, rows, num_blocks, width, num_counts;
  float column_price;
  uint8_t* chosen;  // [h, nb]
  uint8_t* single;  // [h, M]
};

inline void search_union(const UnionSearch& u, int64_t head) {
  const int64_t blocks = u.num_blocks;
  std::vector<float> left(u.rows * blocks), need(u.rows), most(u.width);
  std::vector<uint8_t> now(blocks), row_chosen(blocks), now_single(u.width);
  const int64_t* columns = u.columns + head * u.width;
  const float* column_mass = u.column_mass + head * u.rows * u.width;
  for (int64_t r = 0; r < u.rows; ++r) {
    const float* mass = u.blocks + (head * u.rows + r) * blocks;
    float in_base = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) {
      in_base += u.base[b] ? mass[b] : 0.0f;
      left[r * blocks + b] = u.base[b] ? 0.0f : mass[b];
    }
    need[r] = u.coverage[head] - in_base;
  }
  uint8_t* best = u.chosen + head * blocks;
  uint8_t* best_single = u.single + head * u.width;
  std::copy_n(u.base, blocks, best);
  std::fill_n(best_single, u.width, uint8_t{0});
  float least = -1.0f;  // none yet
  int64_t from = 0;
  for (int64_t i = 0; i < u.num_counts; ++i) {
    const int64_t count = u.counts[i];
    for (int64_t r = 0; r < u.rows; ++r) {
      const float* mass = column_mass + r * u.width;
      for (int64_t m = from; m < count; ++m) {
        left[r * blocks + columns[m] / kMassBlock] -= mass[m];
        need[r] -= mass[m];
        most[m] = mass[m] > most[m] ? mass[m] : most[m];
      }
    }
    from = count;
    std::copy_n(u.base, blocks, now.data());
    for (int64_t r = 0; r < u.rows; ++r) {
      if (!(need[r] > 0.0f)) continue;
      heaviest_of_row(left.data() + r * blocks, blocks, need[r], row_chosen.data());
      for (int64_t b = 0; b < blocks; ++b) now[b] |= row_chosen[b];
    }
    float cost = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) cost += now[b] ? kMassBlock : 0;
    int64_t singles = 0;
    for (int64_t m = 0; m < count; ++m) {
      now_single[m] = most[m] > 0.0f && !now[columns[m] / kMassBlock];
      singles += now_single[m];
    }
    cost += static_cast<float>(singles) * u.column_price;
    if (least >= 0.0f && !(cost < least)) continue;
    least = cost;
    std::copy_n(now.data(), blocks, best);
    std::copy_n(now_single.data(), count, best_single);
    // Nothing is cheaper than the base alone.
    if (singles == 0 && std::memcmp(best, u.base, blocks) == 0) return;
  }
}

}  // namespace vllm_sparse
