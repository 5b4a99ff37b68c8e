// Prefill: one query tile of one head over the keys it selects.
//
// The tile's 64 queries lie in the lanes: Q is held transposed [D, 64], scores come out as
// [keys, 64], the output accumulates as [D, 64]. Keys and values are then only ever read as
// scalars that are broadcast, so a key is used where it lies in its page, and a single gathered
// column costs what a key of a whole block costs (1.07 of it, measured).
#pragma once

#include "tile_operands.h"

namespace vllm_sparse {
namespace {

// One head of the tile, in scratch memory.
struct TileHead : SoftmaxTile {
  float* q;  // [D, 64] numbers, or [D / 2, 64] pairs

  TileHead(float* scratch, int64_t head_size_, float scale_, float* shared_scores) {
    head_size = head_size_;
    scale = scale_;
    scores = shared_scores;
    q = scratch;
    out = q + head_size * kTile;
    top = out + head_size * kTile;
    sum = top + kTile;
  }
  static size_t floats(int64_t head_size) { return 2 * head_size * kTile + 2 * kTile; }
};

// `accumulate` for kWidth vectors of queries from `first` on, kDepth dims at a time.
template <class T, int kDepth, int kWidth>
inline void accumulate_vectors(const TileHead& s, const float* packed, int count, int first) {
  using Step = typename Operands<T>::Step;
  constexpr int kRows = kBlock / Operands<T>::kNumbers;
  for (int64_t d = 0; d < s.head_size; d += kDepth) {
    const Step* value =
        reinterpret_cast<const Step*>(packed) + d / kStrip * kStrip * kRows + d % kStrip;
    Vec acc[kDepth][kWidth];
    float* out = s.out + d * kTile + first * kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < kDepth; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) acc[i][j] = load(out + i * kTile + j * kLanes);
    const float* p = s.scores + first * kLanes;
    for (int n = 0; n < count; ++n, p += kTile, value += kStrip) {
      Vec x[kWidth];
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) x[j] = load(p + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kDepth; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) acc[i][j] = add_product(acc[i][j], x[j], value[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kDepth; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) store(out + i * kTile + j * kLanes, acc[i][j]);
  }
}

// out[d, :] += sum_n values[n][d] * p[n, :] over `count` steps, where the scores were, for the
// first `vectors` vectors of queries.
template <class T>
inline void accumulate(const TileHead& s, const float* packed, int count, int vectors = kVectors) {
  // As many sums at once as with all vectors, as long as there are registers.
  constexpr int kNarrow = kLanes == 16 ? 16 : 8;
  int c = 0;
  for (; c + kVecs <= vectors; c += kVecs) accumulate_vectors<T, kDims, kVecs>(s, packed, count, c);
  for (; c < vectors; ++c) accumulate_vectors<T, kNarrow, 1>(s, packed, count, c);
}

// Where some keys lie, in the cache or converted.
template <class T>
struct KeyRows {
  const typename Operands<T>::Step* row[kScoreRows];
  int64_t position[kBlock];  // relative to the tile's first query
  bool masked = false;       // whether some query may not see some key
  int count;

  KeyRows(const SharedBlock& block, const Rows<T>& rows, const Keys& keys, int64_t first_query)
      : count(keys.count) {
    const T* k[kBlock];
    const T* v[kBlock];
    rows.find(keys.position, count, k, v);
    for (int n = 0; n < count; ++n) {
      row[n] = Operands<T>::key(k[n], block.head_size, block.keys + n * block.head_size);
      position[n] = keys.position[n] - first_query;
      masked |= position[n] > 0;
    }
    for (int n = count; n < kScoreRows; ++n) row[n] = row[count - 1];
    Operands<T>::pack_values(block, v, count);
  }
};

// Keys and values to fetch beside `times` blocks of scores.
template <class T>
inline void look_ahead(const Rows<T>& rows, const Keys& keys, int64_t head_size, int times,
                       Ahead& ahead) {
  const T* k[kBlock];
  const T* v[kBlock];
  rows.find(keys.position, keys.count, k, v);
  for (int n = 0; n < keys.count; ++n) ahead.row[ahead.count++] = k[n];
  for (int n = 0; n < keys.count; ++n) ahead.row[ahead.count++] = v[n];
  ahead.bytes = head_size * sizeof(T);
  ahead.step = ahead.count / (times * (kScoreRows / kKeys)) + 1;
}

// Adds keys whose scores are logits but for the scale.
template <class T>
inline void add_scored(const TileHead& head, const SoftmaxTile& scored, const SharedBlock& block,
                       int count) {
  softmax_step(scored, count);
  accumulate<T>(head, block.values, Operands<T>::pack_probabilities(head.scores, count));
}

template <class T>
inline void attend(const TileHead& head, const SharedBlock& block, const KeyRows<T>& keys,
                   Ahead& ahead) {
  score(head.q, keys.row, keys.count, head.head_size / Operands<T>::kNumbers, 0, kVectors,
        head.scores, ahead);
  if (keys.masked) mask_causal(head, keys.position, keys.count);
  add_scored<T>(head, head, block, keys.count);
}

// Attends one head to the means of what it leaves out.
template <class T>
void attend_means(const Prefill& a, const TileWork& w, const TilePlace& place, const Rows<T>& rows,
                  const SharedBlock& block, const TileHead& head, int g) {
  LeftOut left(a, w.list_row + g, place);
  float log_count[kBlock];
  const typename Operands<T>::Step* row[kScoreRows];
  Ahead nothing;
  for (;;) {
    const int count = Operands<T>::means(a, w, rows, left, block, row, log_count);
    if (count == 0) return;
    for (int n = count; n < kScoreRows; ++n) row[n] = row[count - 1];
    score(head.q, row, count, head.head_size / Operands<T>::kNumbers, 0, kVectors, head.scores,
          nothing);
    add_scored<T>(head, weigh(head, log_count, count), block, count);
  }
}

template <class T>
void prefill_tile(const Prefill& a, const TileWork& w, float* scratch) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const TilePlace place(a, w);
  const Rows<T> rows(a.kv, w.seq, w.head / (shape.num_heads / shape.num_kv_heads));
  const SharedBlock block(scratch, head_size);
  float* heads = scratch + SharedBlock::floats(head_size);
  const auto head_of = [&](int g) {
    return TileHead(heads + g * TileHead::floats(head_size), head_size,
                    Operands<T>::scale(shape), block.scores);
  };
  for (int g = 0; g < w.heads; ++g) {
    const TileHead head = head_of(g);
    head.clear();
    const T* q = static_cast<const T*>(a.q) + place.begin * a.q_row_stride +
                 (w.head + g) * a.q_head_stride;
    const T* queries[kTile];
    for (int i = 0; i < kTile; ++i) queries[i] = i < place.rows ? q + i * a.q_row_stride : nullptr;
    for (int c = 0; c < kTile; c += kLanes) {
      Operands<T>::pack_queries(shape, queries + c, head.q + c);
    }
  }

  GroupSelection selection(a, w, place.last_query);
  Keys wanted, next;
  for (; selection.block() >= 0; selection.advance()) {
    selection.block_keys(selection.block(), wanted);
    const KeyRows<T> keys(block, rows, wanted, place.first_query);
    Ahead ahead;
    if (selection.after() >= 0) {
      selection.block_keys(selection.after(), next);
      look_ahead(rows, next, head_size, selection.readers(), ahead);
    }
    for (int g = 0; g < w.heads; ++g) {
      if (selection.reads(g)) attend(head_of(g), block, keys, ahead);
    }
  }
  Ahead nothing;
  for (int g = 0; g < w.heads; ++g) {
    if (a.columns != nullptr) {
      Selection& columns = selection.head(g);
      for (columns.columns(wanted); wanted.count > 0; columns.columns(wanted)) {
        const KeyRows<T> keys(block, rows, wanted, place.first_query);
        attend(head_of(g), block, keys, nothing);
      }
    }
    if (a.k_means != nullptr) attend_means(a, w, place, rows, block, head_of(g), g);
    write_tile<T>(a, head_of(g), place, w.head + g);
  }
}

}  // namespace
}  // namespace vllm_sparse
