// Rows that share hash buckets with the query, beside those that were drawn.
#pragma once

#include "host_expect.h"
#include "lsh_query.h"

namespace vllm_sparse {
namespace {

constexpr int64_t kChosenAhead = 16;  // keys of chosen rows that are fetched ahead

// Scratch of LSH: [D], [columns], [tables], [rows of a page], [count of the range].
struct HashScratch {
  float* direction;
  float* projections;
  uint16_t* codes;
  uint8_t* hits;
  uint8_t* marks;
};

typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4), may_alias));

// In how many tables each row of a page is in the query's bucket, at most 255 of them. Fetches
// `next` meanwhile: the next page's codes.
inline void count_hits(const uint8_t* codes, const uint8_t* next, const uint16_t* query,
                       int64_t tables, int64_t page_rows, uint8_t* hits) {
  constexpr int kAtOnce = 4 * sizeof(Bytes);
  if (page_rows % kAtOnce != 0) {
    std::memset(hits, 0, page_rows);
    for (int64_t t = 0; t < tables; ++t, codes += page_rows) {
      for (int64_t i = 0; i < page_rows; ++i) hits[i] += codes[i] == static_cast<uint8_t>(query[t]);
    }
    return;
  }
  for (int64_t i = 0; i < page_rows; i += kAtOnce) {
    Bytes sum[4] = {};
    const uint8_t* from = codes + i;
    for (int64_t t = 0; t < tables; ++t, from += page_rows) {
      const Bytes code = Bytes{} + static_cast<uint8_t>(query[t]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Bytes x;
        std::memcpy(&x, from + j * sizeof(x), sizeof(x));
        sum[j] -= (Bytes)(x == code);
      }
      fetch_lines(next + t * page_rows + i, kAtOnce);
    }
    std::memcpy(hits + i, sum, sizeof(sum));
  }
}

constexpr uint8_t kDrawn = 1, kHit = 2;

// Marks the rows of a range that share at least two buckets with the query; returns how many.
inline int64_t mark_hits(const Host& h, const HostItem& item, const HostRange& r,
                         const int64_t* segments, const HashScratch& s) {
  const int64_t page_rows = int64_t{1} << h.shift;
  int64_t count = 0;
  for (int64_t page = r.first >> h.shift; page << h.shift < r.last; ++page) {
    const bool more = (page + 1) << h.shift < r.last;
    const Sketch sketch(h, item.layer, segments[page], item.kv_head);
    const Sketch next(h, item.layer, segments[page + more], item.kv_head);
    count_hits(sketch.codes, next.codes, s.codes, h.tables, page_rows, s.hits);
    const int64_t start = page << h.shift;
    const int64_t begin = r.first > start ? r.first - start : 0;
    const int64_t end = r.last - start < page_rows ? r.last - start : page_rows;
    uint8_t* to = s.marks + start - r.base;
    for (int64_t i = begin; i < end; ++i) to[i] |= s.hits[i] >= 2 ? kHit : 0;
    for (int64_t i = begin; i < end; ++i) count += s.hits[i] >= 2;
  }
  return count;
}

// Calls with(i) for every mark that is set, of `count`, a multiple of eight.
template <class With>
inline void for_marks(const uint8_t* marks, int64_t count, const With& with) {
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, marks + i, sizeof(eight));
    for (; eight != 0; eight &= ~(uint64_t{255} << (__builtin_ctzll(eight) & ~7))) {
      with(i + __builtin_ctzll(eight) / 8);
    }
  }
}

// Adds to a sample that was drawn by weight every row that shares two buckets with the query
// (MagicPIG) or, where those are more than `room`, an even part of them. The two are drawn without
// regard to each other, so a row is in either of them with probability 1 - (1 - p) (1 - u).
template <class T>
void choose_lsh(const Host& h, const HostItem& item, const HostRange& r, const HashScratch& s,
                const float* weights, const RowView& view, float c, float u, int64_t room,
                Chosen* chosen) {
  Lsh a = {};
  a.head_size = h.head_size, a.group = h.group, a.bits = h.bits, a.tables = h.tables;
  a.directions = h.directions, a.log_inclusion = h.log_inclusion;
  LshScratch lsh(a, s.direction);
  lsh.direction = s.direction, lsh.projection = s.projections, lsh.codes = s.codes;
  mean_direction(a, item.q, lsh.direction);
  hash_query(a, lsh);
  std::memset(s.marks, 0, r.count);
  for (int64_t n = 0; n < chosen->count; ++n) s.marks[chosen->rows[n] - r.base] = kDrawn;
  const int64_t hits = mark_hits(h, item, r, view.segments, s);
  const double part = hits > room ? static_cast<double>(room) / hits : 1.0;
  double sum = 0.0, next = hits > room ? u : 0.0;
  chosen->count = 0;
  for_marks(s.marks, r.count, [&](int64_t i) {
    bool take = s.marks[i] & kDrawn;
    if (s.marks[i] & kHit) {
      sum += part;
      if (sum >= next) take = true, next += part < 1.0 ? 1.0 : 0.0;
    }
    if (take) chosen->enter(r.base + i, 0.0f);
  });
  const auto key = [&](int64_t n) {
    return reinterpret_cast<const T*>(view.rows +
                                      row_offset(view, chosen->rows[n], view.row_bytes));
  };
  const auto fetch = [&](int64_t n) {
    if (n < chosen->count) fetch_lines(key(n), h.head_size * sizeof(T));
  };
  for (int64_t n = 0; n < kChosenAhead; ++n) fetch(n);
  for (int64_t first = 0; first < chosen->count; first += kBlock) {
    const int64_t left = chosen->count - first, count = left < kBlock ? left : kBlock;
    float drawn[kBlock] = {}, hit[kBlock] = {};
    for (int64_t n = 0; n < count; ++n) {
      fetch(first + n + kChosenAhead);
      const int64_t row = chosen->rows[first + n];
      drawn[n] = weights[row - r.base] * c;
      const Sketch sketch(h, item.layer, view.segments[row >> h.shift], item.kv_head);
      const float scale = std::is_same<T, Int8>::value ? row_scales(view, row)[0] : 1.0f;
      hit[n] = inclusion(a, key(first + n), sketch.centre, scale, lsh.direction).log_prob;
    }
    for (int64_t n = 0; n < kBlock; n += kLanes) {
      const Vec p = load(drawn + n);
      const Vec either = p + exp(load(hit + n)) * static_cast<float>(part) * (1.0f - p);
      store(drawn + n, select(p < 1.0f, either, splat(1.0f)));
    }
    std::memcpy(chosen->log_prob + first, drawn, count * sizeof(float));
  }
}

}  // namespace
}  // namespace vllm_sparse
