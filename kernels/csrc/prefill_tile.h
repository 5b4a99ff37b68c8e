// Prefill: one query tile of one head over the keys it selects.
//
// The tile's 64 queries lie in the lanes: Q is held transposed [D, 64], scores come out as
// [keys, 64], the output accumulates as [D, 64]. Keys and values are then only ever read as
// scalars that are broadcast, so a key is used where it lies in its page, and a single gathered
// column costs what a key of a whole block costs (1.07 of it, measured).
#pragma once

#include <type_traits>

#include "left_out.h"
#include "rows.h"
#include "score_tile.h"
#include "softmax_tile.h"

namespace vllm_sparse {
namespace {

// One head of the tile, in scratch memory.
struct TileHead : SoftmaxTile {
  float* q;  // [D, 64], scaled

  TileHead(float* scratch, int64_t head_size_, float* shared_scores) {
    head_size = head_size_;
    scale = 1.0f;
    scores = shared_scores;
    q = scratch;
    out = q + head_size * kTile;
    top = out + head_size * kTile;
    sum = top + kTile;
  }
  static size_t floats(int64_t head_size) { return 2 * head_size * kTile + 2 * kTile; }
};

// What the heads share while they attend to the same keys.
struct SharedBlock {
  float* scores;  // [kScoreRows, 64]
  float* values;  // [D / 16, 64, 16] the values in fp32
  float* keys;    // [64, D] the keys in fp32; of an fp32 cache only means
  int64_t head_size;

  SharedBlock(float* scratch, int64_t head_size) : head_size(head_size) {
    scores = scratch;
    values = scores + kScoreRows * kTile;
    keys = values + head_size * kBlock;
  }
  static size_t floats(int64_t head_size) {
    return kScoreRows * kTile + 2 * kBlock * head_size;
  }
};

// Copies one row of V to where `accumulate` reads it. In the page the rows of a strip of 16 dims
// lie 2 D floats apart, which maps them to a handful of L1 sets: reading them there cost 20% of
// the whole kernel at D = 128.
template <class T>
inline void pack_value(const SharedBlock& s, const T* row, int n) {
  for (int64_t strip = 0; strip < s.head_size / kStrip; ++strip) {
    float* to = s.values + (strip * kBlock + n) * kStrip;
    convert_row(row + strip * kStrip, to, kStrip);
  }
}

// out[d, :] += sum_n values[n][d] * scores[n, :]
inline void accumulate(const TileHead& s, const float* packed, int count) {
  for (int64_t d = 0; d < s.head_size; d += kDims) {
    const float* values = packed + d / kStrip * kStrip * kBlock + d % kStrip;
    for (int c = 0; c < kVectors; c += kVecs) {
      Vec acc[kDims][kVecs];
      float* out = s.out + d * kTile + c * kLanes;
#pragma GCC unroll 8
      for (int i = 0; i < kDims; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) acc[i][j] = load(out + i * kTile + j * kLanes);
      const float* p = s.scores + c * kLanes;
      const float* value = values;
      for (int n = 0; n < count; ++n, p += kTile, value += kStrip) {
        Vec x[kVecs];
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) x[j] = load(p + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kDims; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kVecs; ++j) acc[i][j] += value[i] * x[j];
      }
#pragma GCC unroll 8
      for (int i = 0; i < kDims; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) store(out + i * kTile + j * kLanes, acc[i][j]);
    }
  }
}

// Where some keys lie, in the cache or converted.
struct KeyRows {
  const float* row[kScoreRows];
  int64_t position[kBlock];  // relative to the tile's first query
  bool masked = false;       // whether some query may not see some key
  int count;

  template <class T>
  KeyRows(const SharedBlock& block, const Rows<T>& rows, const Keys& keys, int64_t first_query)
      : count(keys.count) {
    const T* k[kBlock];
    const T* v[kBlock];
    rows.find(keys.position, count, k, v);
    for (int n = 0; n < count; ++n) {
      if constexpr (std::is_same_v<T, float>) {
        row[n] = k[n];
      } else {
        convert_row(k[n], block.keys + n * block.head_size, block.head_size);
        row[n] = block.keys + n * block.head_size;
      }
      pack_value(block, v[n], n);
      position[n] = keys.position[n] - first_query;
      masked |= position[n] > 0;
    }
    for (int n = count; n < kScoreRows; ++n) row[n] = row[count - 1];
  }
};

inline void attend(const TileHead& head, const SharedBlock& block, const KeyRows& keys,
                   Ahead& ahead) {
  score(head.q, keys.row, keys.count, head.head_size, 0, kVectors, head.scores, ahead);
  if (keys.masked) mask_causal(head, keys.position, keys.count);
  softmax_step(head, keys.count);
  accumulate(head, block.values, keys.count);
}

// Attends one head to the means of what it leaves out.
template <class T>
void attend_means(const Prefill& a, const TileWork& w, const TilePlace& place, const Rows<T>& rows,
                  const SharedBlock& block, const TileHead& head, int g) {
  LeftOut left(a, w.list_row + g, place);
  float log_count[kBlock];
  Ahead nothing;
  for (;;) {
    const int count = mean_rows(a, w, rows, left, block.keys, block.values, kStrip,
                                kBlock * kStrip, log_count);
    if (count == 0) return;
    const float* row[kScoreRows];
    for (int n = 0; n < kScoreRows; ++n) {
      row[n] = block.keys + (n < count ? n : count - 1) * block.head_size;
    }
    score(head.q, row, count, head.head_size, 0, kVectors, head.scores, nothing);
    softmax_step(weigh(head, log_count, count), count);
    accumulate(head, block.values, count);
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
    return TileHead(heads + g * TileHead::floats(head_size), head_size, block.scores);
  };
  for (int g = 0; g < w.heads; ++g) {
    const TileHead head = head_of(g);
    head.clear();
    const T* q = static_cast<const T*>(a.q) + place.begin * a.q_row_stride +
                 (w.head + g) * a.q_head_stride;
    for (int c = 0; c < kTile; c += kLanes) {
      for (int64_t d = 0; d < head_size; d += kLanes) {
        Vec r[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          r[i] = c + i < place.rows ? load_row(q + (c + i) * a.q_row_stride + d) * shape.scale
                                    : Vec{};
        }
        transpose(r);
        for (int i = 0; i < kLanes; ++i) store(head.q + (d + i) * kTile + c, r[i]);
      }
    }
  }

  GroupSelection selection(a, w, place.last_query);
  Keys wanted, next;
  const T* ahead_k[kBlock];
  const T* ahead_v[kBlock];
  for (; selection.block() >= 0; selection.advance()) {
    selection.block_keys(selection.block(), wanted);
    const KeyRows keys(block, rows, wanted, place.first_query);
    Ahead ahead;
    if (selection.after() >= 0) {
      selection.block_keys(selection.after(), next);
      rows.find(next.position, next.count, ahead_k, ahead_v);
      for (int n = 0; n < next.count; ++n) ahead.row[ahead.count++] = ahead_k[n];
      for (int n = 0; n < next.count; ++n) ahead.row[ahead.count++] = ahead_v[n];
      ahead.bytes = head_size * sizeof(T);
      ahead.step = ahead.count / (selection.readers() * (kScoreRows / kKeys)) + 1;
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
        const KeyRows keys(block, rows, wanted, place.first_query);
        attend(head_of(g), block, keys, nothing);
      }
    }
    if (a.k_means != nullptr) attend_means(a, w, place, rows, block, head_of(g), g);
    write_tile<T>(a, head_of(g), place, w.head + g);
  }
}

}  // namespace
}  // namespace vllm_sparse
