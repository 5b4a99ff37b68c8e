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

// Fetches rows line by line, as kernels say while they work.
class Cursor {
 public:
  template <class T>
  Cursor(const Chunk<T>& chunk, int first)
      : row_(pointers(chunk) + (first < chunk.count ? first : chunk.count)),
        end_(pointers(chunk) + chunk.count) {}

  template <class T>
  void then(const Chunk<T>& chunk) {
    then_ = pointers(chunk), then_end_ = then_ + chunk.count;
  }

  // One line, or two that follow each other. False where there is none any more.
  template <int kLines>
  bool fetch(int64_t row_bytes) {
    if (at_ >= row_bytes) at_ = 0, ++row_;
    if (row_ == end_) {
      if (then_ == then_end_) return false;
      row_ = then_, end_ = then_end_, then_ = then_end_;
    }
    const char* line = *row_ + at_;
    __builtin_prefetch(line, 0, 2);
    if (kLines == 2) __builtin_prefetch(line + 64, 0, 2);
    at_ += 64 * kLines;
    return true;
  }

 private:
  template <class T>
  static const char* const* pointers(const Chunk<T>& chunk) {
    return reinterpret_cast<const char* const*>(chunk.keys);
  }

  const char* const* row_;
  const char* const* end_;
  const char* const* then_ = nullptr;
  const char* const* then_end_ = nullptr;
  int64_t at_ = 0;
};

// Has every row fetched twice: while the chunk before it is worked on, and again 16 rows before it
// is read.
//
// Into the second-level cache: a core waits for about 24 lines on their way to the first level,
// half of what its memory could give it, and for more on their way to the second. Such a fetch is
// dropped where too many are under way, without a word: a loop of nothing else "fetches" 136 GB/s
// from a memory that gives 30. So the pace is even, and the second time gets what was dropped: a
// thread alone reads 1.25 times as much, two threads 1.1 times (Zen 4).
class Feed {
 public:
  template <class T>
  Feed(const Chunk<T>& now, const Chunk<T>& next, int64_t row_bytes)
      : far_(next, 0), near_(now, kNear), row_bytes_(row_bytes) {
    near_.then(next);
  }

  // So many lines of the next chunk.
  void far(int lines) {
    for (int i = 0; i < lines && far_.fetch<1>(row_bytes_); ++i) {
    }
  }
  // So many lines again, of what is read soon.
  void near(int lines) {
    for (int i = 0; i < lines && near_.fetch<1>(row_bytes_); ++i) {
    }
  }
  // Two lines at once take less than half of the instructions.
  void far_two() { far_.fetch<2>(row_bytes_); }
  void near_two() { near_.fetch<2>(row_bytes_); }

 private:
  static constexpr int kNear = 16;
  Cursor far_, near_;
  int64_t row_bytes_;
};

}  // namespace
}  // namespace vllm_sparse
