// Where the rows of a context lie, 64 of them at a time.
#pragma once

#include "gather.h"
#include "decode_split.h"
#include "int8_row.h"

namespace vllm_sparse {
namespace {

inline int64_t row_offset(const RowView& view, int64_t row, int64_t bytes) {
  const int64_t within = row & ((int64_t{1} << view.shift) - 1);
  return view.segments[row >> view.shift] + within * bytes;
}

constexpr int64_t kScaleBytes = 2 * sizeof(float);

inline const float* row_scales(const RowView& view, int64_t row) {
  return reinterpret_cast<const float*>(view.scales + row_offset(view, row, kScaleBytes));
}

template <class T>
struct Chunk {
  const T* keys[kBlock];
  const T* values[kBlock];
  int64_t rows[kBlock];
  int count;
  bool scattered;  // most rows do not follow the one before in memory

  // Rows `first` .. of an item, at most 64 and none from `last` on; `rows` null: of the context.
  // The pointers behind the last row repeat it, so that kernels may work on whole steps.
  void find(const RowView& view, const int64_t* from, int64_t first, int64_t last) {
    count = static_cast<int>(last - first < kBlock ? (last > first ? last - first : 0) : kBlock);
    int jumps = 0;
    for (int n = 0; n < count; ++n) {
      rows[n] = from != nullptr ? from[first + n] : first + n;
      const char* row = view.rows + row_offset(view, rows[n], view.row_bytes);
      jumps += n > 0 && row != reinterpret_cast<const char*>(keys[n - 1]) + view.row_bytes;
      keys[n] = reinterpret_cast<const T*>(row);
      values[n] = reinterpret_cast<const T*>(row + view.row_bytes / 2);
    }
    scattered = 2 * jumps > count;
    for (int n = count; n < kBlock && count > 0; ++n) {
      keys[n] = keys[count - 1];
      values[n] = values[count - 1];
    }
  }
};

// Fetches the rows of a chunk line by line, as kernels say while they work on the one before.
//
// Into the second-level cache: a core waits for about 24 lines on their way to the first level,
// half of what its memory could give it, and for more on their way to the second (Zen 4). Evenly,
// for the hardware's own prefetching to join in.
class Feed {
 public:
  template <class T>
  Feed(const Chunk<T>& chunk, int64_t row_bytes)
      : rows_(reinterpret_cast<const char* const*>(chunk.keys)),
        end_(rows_ + chunk.count),
        row_bytes_(row_bytes) {}

  void lines(int count) {
    for (int i = 0; i < count && rows_ != end_; ++i) {
      __builtin_prefetch(*rows_ + at_, 0, 2);
      at_ += 64;
      if (at_ >= row_bytes_) at_ = 0, ++rows_;
    }
  }

 private:
  const char* const* rows_;
  const char* const* end_;
  int64_t row_bytes_, at_ = 0;
};

}  // namespace
}  // namespace vllm_sparse
