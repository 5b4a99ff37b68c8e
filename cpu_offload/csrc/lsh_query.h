// Which rows share at least two hash buckets with a query, and how likely that was.
// SimHash of K bits in L tables, sampling as in MagicPIG (arXiv:2410.16179).
#pragma once

#include "chunk.h"

namespace vllm_sparse {
namespace {

constexpr int kTablesAhead = 4;  // tables whose buckets are fetched ahead
constexpr int kRowsAhead = 16;

struct LshScratch {
  float* direction;   // [D], unit length, or zeros
  float* projection;  // [L * K], rounded up to vectors
  uint16_t* codes;    // [L]
  uint8_t* hits;      // [2^shift] tables that each row shares

  static int64_t columns(const Lsh& a) { return (a.tables * a.bits + 63) / 64 * 64; }
  static size_t floats(const Lsh& a) {
    int64_t rows = 0;
    for (int64_t i = 0; i < a.num_items; ++i) {
      const int64_t segment = int64_t{1} << a.items[i].view.shift;
      rows = segment > rows ? segment : rows;
    }
    return a.head_size + columns(a) + (a.tables + 31) / 32 * 16 + rows / 4 + 16;
  }
  LshScratch(const Lsh& a, float* scratch)
      : direction(scratch),
        projection(direction + a.head_size),
        codes(reinterpret_cast<uint16_t*>(projection + columns(a))),
        hits(reinterpret_cast<uint8_t*>(codes + (a.tables + 31) / 32 * 32)) {}
};

// The mean of the group's unit queries, at unit length. All zeros for queries that are: their
// projections are zero, and so is the cosine that the inclusion probability is taken at.
inline void mean_direction(const Lsh& a, const float* q, float* direction) {
  std::memset(direction, 0, a.head_size * sizeof(float));
  float weight = 1.0f;
  for (int64_t g = 0; g <= a.group; ++g) {
    const float* x = g < a.group ? q + g * a.head_size : direction;
    double squares = 0.0;
    for (int64_t d = 0; d < a.head_size; ++d) squares += double(x[d]) * x[d];
    weight = squares > 0.0 ? static_cast<float>(1.0 / std::sqrt(squares)) : 0.0f;
    if (g == a.group) break;
    for (int64_t d = 0; d < a.head_size; ++d) direction[d] += x[d] * weight;
  }
  for (int64_t d = 0; d < a.head_size; ++d) direction[d] *= weight;
}

inline void hash_query(const Lsh& a, const LshScratch& s) {
  const int64_t columns = a.tables * a.bits;
  constexpr int kStep = 8 * kLanes;
  for (int64_t c = 0; c < columns; c += kStep) {
    const int64_t left = columns - c;
    if (left >= kStep) {
      Vec acc[8] = {};
      for (int64_t d = 0; d < a.head_size; ++d) {
        const float* r = a.directions + d * columns + c;
        const float x = s.direction[d];
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) acc[j] += load(r + j * kLanes) * x;
      }
      for (int j = 0; j < 8; ++j) store(s.projection + c + j * kLanes, acc[j]);
      continue;
    }
    for (int64_t j = 0; j < left; ++j) s.projection[c + j] = 0.0f;
    for (int64_t d = 0; d < a.head_size; ++d) {
      const float* r = a.directions + d * columns + c;
      for (int64_t j = 0; j < left; ++j) s.projection[c + j] += r[j] * s.direction[d];
    }
  }
  for (int64_t t = 0; t < a.tables; ++t) {
    uint16_t code = 0;
    for (int64_t k = 0; k < a.bits; ++k) {
      code |= static_cast<uint16_t>(s.projection[t * a.bits + k] > 0.0f) << k;
    }
    s.codes[t] = code;
  }
}

// Counts, for every row of a segment, the tables in which it shares the query's bucket.
inline void count_hits(const Lsh& a, const LshItem& item, const LshSegment& segment,
                       const LshScratch& s) {
  const int64_t buckets = int64_t{1} << a.bits;
  const int64_t capacity = int64_t{1} << item.view.shift;
  const uint32_t* offsets = segment.offsets + item.kv_head * a.tables * (buckets + 1);
  const uint16_t* ids = segment.ids + item.kv_head * a.tables * capacity;
  const uint16_t* recent = segment.recent + item.kv_head * a.tables * segment.recent_stride;
  std::memset(s.hits, 0, segment.length);
  for (int64_t t = 0; t < a.tables; ++t) {
    __builtin_prefetch(offsets + t * (buckets + 1) + s.codes[t], 0, 3);
  }
  for (int64_t t = 0; t < a.tables + kTablesAhead; ++t) {
    if (t < a.tables) {
      const uint32_t* range = offsets + t * (buckets + 1) + s.codes[t];
      const uint16_t* bucket = ids + t * capacity;
      for (int64_t i = range[0]; i < range[1]; i += 32) __builtin_prefetch(bucket + i, 0, 3);
    }
    if (t < kTablesAhead) continue;
    const int64_t now = t - kTablesAhead;
    const uint32_t* range = offsets + now * (buckets + 1) + s.codes[now];
    const uint16_t* bucket = ids + now * capacity;
    for (int64_t i = range[0]; i < range[1]; ++i) ++s.hits[bucket[i]];
  }
  const int64_t count = segment.length - segment.built;
  uint8_t* hits = s.hits + segment.built;
  for (int64_t t = 0; t < a.tables; ++t) {
    const uint16_t* codes = recent + t * segment.recent_stride;
    const uint16_t code = s.codes[t];
    for (int64_t r = 0; r < count; ++r) hits[r] += codes[r] == code;
  }
}

// Enters the rows with two hits or more, ascending, by eight counters at a time.
inline void collect(const LshSegment& segment, const uint8_t* hits, int64_t base, LshItem& item) {
  const auto enter = [&](int64_t row) {
    if (hits[row] < 2) return;
    if (item.count < item.capacity) item.rows[item.count] = base + row;
    ++item.count;
  };
  int64_t row = 0;
  for (; row + 8 <= segment.length; row += 8) {
    uint64_t eight;
    std::memcpy(&eight, hits + row, sizeof(eight));
    if ((eight & 0xfefefefefefefefeu) == 0) continue;
    for (int64_t i = row; i < row + 8; ++i) enter(i);
  }
  for (; row < segment.length; ++row) enter(row);
}

struct Inclusion {
  float log_prob, along;
};

// ln u at the cosine of the query's direction and a key less its centre.
template <class T>
Inclusion inclusion(const Lsh& a, const T* key, const float* centre, float scale,
                    const float* direction) {
  Vec dot = {}, squares = {};
  for (int64_t d = 0; d < a.head_size; d += kLanes) {
    const Vec x = load_row(key + d) * scale - load(centre + d);
    dot += x * load(direction + d);
    squares += x * x;
  }
  const float along = horizontal_sum(dot), norm = std::sqrt(horizontal_sum(squares));
  float cosine = norm > 0.0f ? along / norm : 0.0f;
  cosine = cosine < -1.0f ? -1.0f : cosine > 1.0f ? 1.0f : cosine;
  const float x = (cosine + 1.0f) * (kInclusionSteps / 2);
  const int step = x < kInclusionSteps - 1 ? static_cast<int>(x) : kInclusionSteps - 1;
  const float* at = a.log_inclusion + step;
  return {at[0] + (at[1] - at[0]) * (x - step), along};
}

template <class T>
void lsh_query(const Lsh& a, LshItem& item, float* scratch) {
  const LshScratch s(a, scratch);
  const RowView& view = item.view;
  mean_direction(a, item.q, s.direction);
  hash_query(a, s);
  item.count = 0;
  const auto key = [&](int64_t i) {
    return reinterpret_cast<const T*>(view.rows + row_offset(view, item.rows[i], view.row_bytes));
  };
  int64_t done = 0;
  for (int64_t base = 0, n = 0; base < view.length; base += int64_t{1} << view.shift, ++n) {
    const LshSegment& segment = item.segments[n];
    count_hits(a, item, segment, s);
    collect(segment, s.hits, base, item);
    const float* centre = segment.centre + item.kv_head * a.head_size;
    const int64_t found = item.count < item.capacity ? item.count : item.capacity;
    for (int64_t i = done; i < found; ++i) {
      // Values too: they are read next.
      if (i + kRowsAhead < found) fetch_lines(key(i + kRowsAhead), view.row_bytes);
      float scale = 1.0f;
      if (std::is_same<T, Int8>::value) scale = row_scales(view, item.rows[i])[0];
      const Inclusion found_at = inclusion(a, key(i), centre, scale, s.direction);
      item.log_prob[i] = found_at.log_prob;
      item.along[i] = found_at.along;
    }
    done = found;
  }
}

}  // namespace
}  // namespace vllm_sparse
