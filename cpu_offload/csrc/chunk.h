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
  bool scattered;  // most rows do not follow the one before

  // Rows `first` .. of an item, at most 64 and none from `last` on; `list` null: of the context.
  // What lies behind the last row repeats it, so that kernels may work on whole steps.
  // False where a row of the list is none of the context; then there are no keys and values.
  bool find(const RowView& view, const int64_t* list, int64_t first, int64_t last) {
    count = static_cast<int>(last - first < kBlock ? (last > first ? last - first : 0) : kBlock);
    scattered = false;
    if (count == 0) return true;
    // Loops of 64 turns without branches, for the compiler to make vectors of.
    if (list == nullptr) {
      for (int n = 0; n < kBlock; ++n) rows[n] = first + (n < count ? n : count - 1);
    } else {
      std::memcpy(rows, list + first, count * sizeof(*rows));
      for (int n = count; n < kBlock; ++n) rows[n] = rows[count - 1];
    }
    int64_t low = rows[0], high = rows[0];
    for (int n = 0; n < kBlock; ++n) {
      low = rows[n] < low ? rows[n] : low;
      high = rows[n] > high ? rows[n] : high;
    }
    if (low < 0 || high >= view.length) return false;
    int64_t follow = 0;
    for (int n = 1; n < kBlock; ++n) follow += rows[n] == rows[n - 1] + 1;
    scattered = 2 * (count - 1 - follow) > count;
    int64_t at[kBlock];
    const int64_t segment = low >> view.shift;
    if (segment == high >> view.shift) {
      const int64_t base = view.segments[segment], row = segment << view.shift;
      for (int n = 0; n < kBlock; ++n) at[n] = base + (rows[n] - row) * view.row_bytes;
    } else {
      for (int n = 0; n < kBlock; ++n) at[n] = row_offset(view, rows[n], view.row_bytes);
    }
    for (int n = 0; n < kBlock; ++n) {
      keys[n] = reinterpret_cast<const T*>(view.rows + at[n]);
      values[n] = reinterpret_cast<const T*>(view.rows + at[n] + view.row_bytes / 2);
    }
    return true;
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
