// Mean correction: the blocks that a tile leaves out, by the mean of what it does not read of each.
// See kernels/left_out.py for what that means and where it is from.
#pragma once

#include <cmath>

#include "rows.h"
#include "softmax_tile.h"

namespace vllm_sparse {
namespace {

// A block of which some keys are not read.
struct OpenBlock {
  int64_t block;
  int64_t columns[kBlock];  // positions of its keys that are read
  int num_columns;

  int rest() const { return kBlock - num_columns; }
};

// Walks the blocks that every row of the tile sees whole, and that its list does not read whole.
class LeftOut {
 public:
  LeftOut(const Prefill& a, int64_t list_row, const TilePlace& place)
      : blocks_(a.blocks + a.block_offsets[list_row]),
        blocks_end_(a.blocks + a.block_offsets[list_row + 1]),
        columns_(a.columns + a.column_offsets[list_row]),
        columns_end_(a.columns + a.column_offsets[list_row + 1]),
        end_((place.first_query + 1) / kBlock),
        last_block_(place.last_query / kBlock),
        last_query_(place.last_query) {}

  // False after the last.
  bool next(OpenBlock& open) {
    for (; block_ < end_; ++block_) {
      while (blocks_ < blocks_end_ && (*blocks_ < block_ || *blocks_ > last_block_)) ++blocks_;
      if (blocks_ < blocks_end_ && *blocks_ == block_) continue;
      open.block = block_;
      open.num_columns = 0;
      const int64_t first = block_ * kBlock;
      for (; columns_ < columns_end_; ++columns_) {
        const int64_t column = *columns_;
        if (column < first || column > last_query_) continue;
        if (column >= first + kBlock) break;
        const int n = open.num_columns;
        if (n == 0 || open.columns[n - 1] < column) open.columns[open.num_columns++] = column;
      }
      if (open.rest() == 0) continue;
      ++block_;
      return true;
    }
    return false;
  }

 private:
  const int32_t* blocks_;
  const int32_t* blocks_end_;
  const int32_t* columns_;
  const int32_t* columns_end_;
  const int64_t end_, last_block_, last_query_;
  int64_t block_ = 0;
};

// The mean of a block's rows without some of them, written in strips of 16, `step` elements apart.
template <class T, class To>
inline void mean_of_rest(const float* mean, const T* const* without, int count, int64_t head_size,
                         To* to, int64_t step) {
  const float share = 1.0f / static_cast<float>(kBlock - count);
  for (int64_t d = 0; d < head_size; d += kStrip, to += step) {
    for (int i = 0; i < kStrip; i += kLanes) {
      Vec x = load(mean + d + i);
      if (count > 0) {
        x *= static_cast<float>(kBlock);
        for (int n = 0; n < count; ++n) x -= load_row(without[n] + d + i);
        x *= share;
      }
      store_row(to + i, x);
    }
  }
}

// Up to 64 blocks that are left out: writes row n of their means to keys + n D, and to
// values + n value_row, whose strips lie value_step apart. Returns how many; 0: there are no more.
template <class T, class To>
inline int mean_rows(const Prefill& a, const TileWork& w, const Rows<T>& rows, LeftOut& left,
                     To* keys, To* values, int64_t value_row, int64_t value_step,
                     float* log_count) {
  const int64_t head_size = a.shape.head_size;
  const int64_t kv_head = w.head / (a.shape.num_heads / a.shape.num_kv_heads);
  const int64_t first = kv_head * (a.seq_lens[w.seq] / kBlock);
  OpenBlock open;
  const T* k[kBlock];
  const T* v[kBlock];
  int count = 0;
  for (; count < kBlock && left.next(open); ++count) {
    rows.find(open.columns, open.num_columns, k, v);
    const int64_t at = (first + open.block) * head_size;
    mean_of_rest(a.k_means[w.seq] + at, k, open.num_columns, head_size, keys + count * head_size,
                 kStrip);
    mean_of_rest(a.v_means[w.seq] + at, v, open.num_columns, head_size,
                 values + count * value_row, value_step);
    log_count[count] = std::log(static_cast<float>(open.rest()));
  }
  return count;
}

// Makes scores of means logits, each of as many keys as the mean stands for.
inline SoftmaxTile weigh(const SoftmaxTile& s, const float* log_count, int count) {
  for (int n = 0; n < count; ++n) {
    for (int c = 0; c < kTile; c += kLanes) {
      float* score = s.scores + n * kTile + c;
      store(score, load(score) * s.scale + log_count[n]);
    }
  }
  SoftmaxTile weighed = s;
  weighed.scale = 1.0f;
  return weighed;
}

}  // namespace
}  // namespace vllm_sparse
