// Prefill: one query tile of one head over the keys it selects.
//
// The tile's 64 queries lie in the lanes: Q is held transposed [D, 64], scores come out as
// [keys, 64], the output accumulates as [D, 64]. Keys and values are then only ever read as
// scalars that are broadcast, so a key is used where it lies in its page, and a single gathered
// column costs what a key of a whole block costs (1.07 of it, measured).
#pragma once

#include <type_traits>

#include "rows.h"
#include "softmax_tile.h"

namespace vllm_sparse {
namespace {

constexpr int kScoreRows = (kBlock + kKeys - 1) / kKeys * kKeys;  // the last group may be padded

// State of one query tile of one head, in scratch memory.
struct TileState : SoftmaxTile {
  float* q;       // [D, 64], scaled
  float* values;  // [D / 16, 64, 16] the block's values in fp32
  float* keys;    // [64, D] the block's keys in fp32; unused where the cache is fp32

  TileState(float* scratch, int64_t head_size_) {
    head_size = head_size_;
    scale = 1.0f;
    q = scratch;
    out = q + head_size * kTile;
    scores = out + head_size * kTile;
    top = scores + kScoreRows * kTile;
    sum = top + kTile;
    values = sum + kTile;
    keys = values + head_size * kBlock;
  }
  static size_t floats(int64_t head_size) {
    return 2 * head_size * kTile + kScoreRows * kTile + 2 * kTile + 2 * kBlock * head_size;
  }
};

// Rows to bring into the cache while something else is computed. Without it a fifth of the time
// went into waiting for rows (measured at 16K keys, D = 128, fp32).
struct Ahead {
  const void* row[kScoreRows];
  int count;
  int64_t bytes;

  void fetch(int first, int n) const {
    for (int i = first; i < first + n && i < count; ++i) {
      const char* line = static_cast<const char*>(row[i]);
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(line + b, 0, 2);
    }
  }
};

// scores[n, :] = sum_d keys[n][d] * q[d, :] for n < count, rounded up to groups of kKeys rows
// (the caller repeats the last row's pointer there).
inline void score(const TileState& s, const float* const* keys, int count, const Ahead& values) {
  const int64_t head_size = s.head_size;
  for (int n = 0; n < count; n += kKeys) {
    values.fetch(n, kKeys);
    const float* row[kKeys];
    for (int i = 0; i < kKeys; ++i) row[i] = keys[n + i];
    for (int c = 0; c < kVectors; c += kVecs) {
      Vec acc[kKeys][kVecs] = {};
      const float* q = s.q + c * kLanes;
      for (int64_t d = 0; d < head_size; ++d, q += kTile) {
        Vec x[kVecs];
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j) x[j] = load(q + j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kVecs; ++j) acc[i][j] += row[i][d] * x[j];
      }
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < kVecs; ++j)
          store(s.scores + (n + i) * kTile + (c + j) * kLanes, acc[i][j]);
    }
  }
}

// Copies one row of V to where `accumulate` reads it. In the page the rows of a strip of 16 dims
// lie 2 D floats apart, which maps them to a handful of L1 sets: reading them there cost 20% of
// the whole kernel at D = 128.
template <class T>
inline void pack_value(const TileState& s, const T* row, int n) {
  for (int64_t strip = 0; strip < s.head_size / kStrip; ++strip) {
    float* to = s.values + (strip * kBlock + n) * kStrip;
    convert_row(row + strip * kStrip, to, kStrip);
  }
}

// out[d, :] += sum_n values[n][d] * scores[n, :]
inline void accumulate(const TileState& s, int count, const Ahead& next_keys) {
  const int rows_a_step = static_cast<int>(kBlock * kDims / s.head_size) + 1;
  for (int64_t d = 0; d < s.head_size; d += kDims) {
    next_keys.fetch(static_cast<int>(d / kDims) * rows_a_step, rows_a_step);
    const float* values = s.values + d / kStrip * kStrip * kBlock + d % kStrip;
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

// Attends the tile, whose first query stands at `first_query`, to some keys. `next` are the keys
// that come after these, if any: they are fetched ahead.
template <class T>
inline void attend(const TileState& s, const Rows<T>& rows, const Keys& keys, const Keys& next,
                   int64_t first_query) {
  const float* k32[kScoreRows];
  int64_t position[kBlock];
  Ahead values, next_keys;
  values.bytes = next_keys.bytes = s.head_size * sizeof(T);
  values.count = keys.count;
  next_keys.count = next.count;
  for (int n = 0; n < next.count; ++n) next_keys.row[n] = rows.key(next.position[n]);
  bool masked = false;
  for (int n = 0; n < keys.count; ++n) {
    const T* k = rows.key(keys.position[n]);
    values.row[n] = rows.value(keys.position[n]);
    if constexpr (std::is_same_v<T, float>) {
      k32[n] = k;
    } else {
      convert_row(k, s.keys + n * s.head_size, s.head_size);
      k32[n] = s.keys + n * s.head_size;
    }
    position[n] = keys.position[n] - first_query;
    masked |= position[n] > 0;
  }
  for (int n = keys.count; n < kScoreRows; ++n) k32[n] = k32[keys.count - 1];
  score(s, k32, keys.count, values);
  if (masked) mask_causal(s, position, keys.count);
  softmax_step(s, keys.count);
  for (int n = 0; n < keys.count; ++n) pack_value(s, static_cast<const T*>(values.row[n]), n);
  accumulate(s, keys.count, next_keys);
}

template <class T>
void prefill_tile(const Prefill& a, const TileWork& w, float* scratch) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const TilePlace place(a, w);
  const TileState s(scratch, head_size);
  const Rows<T> rows(a.kv, w.seq, w.head / (shape.num_heads / shape.num_kv_heads));

  const T* q = static_cast<const T*>(a.q) + place.begin * a.q_row_stride + w.head * a.q_head_stride;
  for (int64_t d = 0; d < head_size; ++d) {
    for (int r = 0; r < kTile; ++r) {
      s.q[d * kTile + r] =
          r < place.rows ? to_float(q[r * a.q_row_stride + d]) * shape.scale : 0.0f;
    }
  }
  s.clear();

  Selection selection(a, w.list_row, place.last_query);
  const auto next_keys = [&selection](Keys& keys) {
    if (selection.block() < 0) return selection.columns(keys);
    selection.block_keys(selection.block(), keys);
    selection.advance();
  };
  Keys now, next;
  next_keys(now);
  while (now.count > 0) {
    next_keys(next);
    attend(s, rows, now, next, place.first_query);
    now = next;
  }
  write_tile<T>(a, s, place, w.head);
}

}  // namespace
}  // namespace vllm_sparse
