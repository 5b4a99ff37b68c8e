// Attention with contextual positions: a tile of query rows over its keys, the last key first.
//
// A key's position is the sum of the gates from it up to the query, so that going backwards a lane
// only carries one sum. What a position adds to a logit lies between two of the query's products
// with the table of positions, which are made once for a tile: [P, 64], as scores are. From where
// every lane has reached the last position, that is one number a lane, and the rest of the keys
// costs what plain attention costs.
#pragma once

#include "prefill_tile.h"

namespace vllm_sparse {
namespace {

struct CopeTile {
  SharedBlock block;
  TileHead head;  // of all lanes, whatever heads they are of
  // [64] the sum of the gates so far, in whole positions and what is over them: as one number it
  // would lose a digit by the hundredth position.
  int32_t* whole;
  float* over;
  float* z;  // [P, 64] products with the table, scaled

  CopeTile(const Cope& a, float scale, float* scratch)
      : block(scratch, a.shape.head_size),
        head(scratch + SharedBlock::floats(a.shape.head_size), a.shape.head_size, scale,
             block.scores) {
    whole = reinterpret_cast<int32_t*>(head.sum + kTile);
    over = head.sum + 2 * kTile;
    z = over + kTile;
  }
  static size_t floats(const Cope& a) {
    // `score` writes whole groups of rows.
    return SharedBlock::floats(a.shape.head_size) + TileHead::floats(a.shape.head_size) +
           (2 + a.num_positions + kKeys) * kTile;
  }
};

// 1 / (1 + exp(-x))
inline Vec sigmoid(Vec x) {
  const IVec negative = x < 0.0f;
  const Vec e = exp(select(negative, x, -x));
  return select(negative, e, splat(1.0f)) / (e + 1.0f);
}

// Where a tile's lanes are: heads one after another, each with all rows.
struct CopeLanes {
  int rows, count, vectors;
  int32_t row[kTile];  // -1: an empty lane

  explicit CopeLanes(const CopeWork& w) : rows(w.rows), count(w.rows * w.heads) {
    vectors = (count + kLanes - 1) / kLanes;
    for (int i = 0; i < kTile; ++i) row[i] = i < count ? i % rows : -1;
  }
  // Which lanes of a vector see a key `position` after the tile's first query.
  IVec see(int vector, int64_t position) const {
    IVec at;
    std::memcpy(&at, row + vector * kLanes, sizeof(at));
    return at >= static_cast<int32_t>(position);
  }
};

// Products of the queries with the table.
template <class T>
void score_positions(const Cope& a, const CopeTile& s, int vectors) {
  const int64_t steps = a.shape.head_size / Operands<T>::kNumbers;
  const T* table = static_cast<const T*>(a.pos_emb);
  Ahead nothing;
  for (int64_t p = 0; p < a.num_positions; p += kBlock) {
    const int count = static_cast<int>(a.num_positions - p < kBlock ? a.num_positions - p : kBlock);
    const typename Operands<T>::Step* row[kScoreRows];
    for (int n = 0; n < kScoreRows; ++n) {
      const int64_t at = n < count ? n : count - 1;
      row[n] = Operands<T>::key(table + (p + at) * a.pos_emb_stride, a.shape.head_size,
                                s.block.keys + at * a.shape.head_size);
    }
    score(s.head.q, row, count, steps, 0, vectors, s.z + p * kTile, nothing);
  }
  for (int c = 0; c < vectors; ++c) {
    scale_scores(s.z + c * kLanes, a.num_positions, s.head.scale);
  }
}

// Adds to each logit what its key's position adds, and hides keys from the queries before them.
template <class T>
inline void add_positions(const Cope& a, const CopeTile& s, const CopeLanes& lanes,
                          const KeyRows<T>& keys) {
  const IVec last = IVec{} + static_cast<int32_t>(a.num_positions - 1);
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int c = 0; c < lanes.vectors; ++c) {
    const float* z = s.z + c * kLanes;
    IVec whole;
    std::memcpy(&whole, s.whole + c * kLanes, sizeof(whole));
    Vec over = load(s.over + c * kLanes);
    Vec low = gather(z, (whole < last ? whole : last) * kTile + lane);
    Vec high = gather(z, (whole < last ? whole + 1 : last) * kTile + lane);
    for (int n = keys.count - 1; n >= 0; --n) {
      float* at = s.head.scores + n * kTile + c * kLanes;
      const IVec sees = keys.masked ? lanes.see(c, keys.position[n]) : IVec{} - 1;
      const Vec x = load(at) * s.head.scale;
      over += select(sees, sigmoid(x), Vec{});
      const IVec full = over >= 1.0f;  // not where it is NaN: no index leaves the table
      if (any(full)) {
        over -= select(full, splat(1.0f), Vec{});
        whole -= full;
        low = select(full, high, low);
        high = gather(z, (whole < last ? whole + 1 : last) * kTile + lane);
      }
      store(at, select(sees, x + low + over * (high - low), splat(-kInf)));
    }
    std::memcpy(s.whole + c * kLanes, &whole, sizeof(whole));
    store(s.over + c * kLanes, over);
  }
}

// The same where every lane has reached the last position.
inline void add_last_position(const Cope& a, const CopeTile& s, int vectors, int count) {
  for (int c = 0; c < vectors; ++c) {
    const Vec added = load(s.z + (a.num_positions - 1) * kTile + c * kLanes);
    float* at = s.head.scores + c * kLanes;
    for (int n = 0; n < count; ++n, at += kTile) store(at, load(at) * s.head.scale + added);
  }
}

inline bool all_reached(const Cope& a, const CopeTile& s, int lanes) {
  bool all = true;
  for (int i = 0; i < lanes; ++i) all &= s.whole[i] >= a.num_positions - 1;
  return all;
}

template <class T>
void cope_tile(const Cope& a, const CopeWork& w, float* scratch) {
  const Shape& shape = a.shape;
  const CopeTile s(a, Operands<T>::scale(shape), scratch);
  const CopeLanes lanes(w);
  const int64_t begin = a.query_start_loc[w.seq];
  const int64_t queries = a.query_start_loc[w.seq + 1] - begin;
  const int64_t first_query = a.seq_lens[w.seq] - queries + w.first_row;
  const int64_t last_query = first_query + w.rows - 1;
  const auto row = [&](int lane) { return begin + w.first_row + lane % w.rows; };
  const auto head = [&](int lane) { return w.head + lane / w.rows; };

  s.head.clear();
  std::memset(s.whole, 0, 2 * kTile * sizeof(float));  // `over` as well
  const T* query[kTile] = {};
  for (int i = 0; i < lanes.count; ++i) {
    query[i] = static_cast<const T*>(a.q) + row(i) * a.q_row_stride + head(i) * a.q_head_stride;
  }
  for (int c = 0; c < lanes.vectors * kLanes; c += kLanes) {
    Operands<T>::pack_queries(shape, query + c, s.head.q + c);
  }
  score_positions<T>(a, s, lanes.vectors);

  const Rows<T> rows(a.kv, w.seq, w.head / (shape.num_heads / shape.num_kv_heads));
  const int64_t steps = shape.head_size / Operands<T>::kNumbers;
  const SoftmaxTile logits = [&] {
    SoftmaxTile tile = s.head;
    tile.scale = 1.0f;  // positions are added to scaled scores
    return tile;
  }();
  int64_t first = last_query < 0 ? -kBlock : last_query / kBlock * kBlock;
  for (; first >= 0; first -= kBlock) {
    const bool reached = all_reached(a, s, lanes.count);
    if (reached && w.part != nullptr) break;
    Keys wanted, next;
    for (int64_t key = first; key < first + kBlock && key <= last_query; ++key) wanted.add(key);
    const KeyRows<T> keys(s.block, rows, wanted, first_query);
    Ahead ahead;
    if (first > 0) {
      for (int64_t key = first - kBlock; key < first; ++key) next.add(key);
      look_ahead(rows, next, shape.head_size, 1, ahead);
    }
    score(s.head.q, keys.row, keys.count, steps, 0, lanes.vectors, s.head.scores, ahead);
    if (reached && !keys.masked) {
      add_last_position(a, s, lanes.vectors, keys.count);
    } else {
      add_positions(a, s, lanes, keys);
    }
    softmax_step(logits, keys.count, lanes.vectors);
    accumulate<T>(s.head, s.block.values,
                  Operands<T>::pack_probabilities(s.head.scores, keys.count), lanes.vectors);
  }
  if (w.part != nullptr) {
    w.part->first_key = first + kBlock <= last_query ? first + kBlock : last_query + 1;
    std::memcpy(w.part->added, s.z + (a.num_positions - 1) * kTile, lanes.count * sizeof(float));
    write_lanes(
        s.head, lanes.count, [&](int i) { return w.part->out + i * shape.head_size; },
        [&](int i) { return w.part->lse + i; });
    return;
  }
  T* out = static_cast<T*>(a.out);
  write_lanes(
      s.head, lanes.count,
      [&](int i) { return out + row(i) * a.out_row_stride + head(i) * a.out_head_stride; },
      [&](int i) { return a.lse + row(i) * shape.num_heads + head(i); });
}

}  // namespace
}  // namespace vllm_sparse
