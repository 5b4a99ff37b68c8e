// Exact attention of a few rows of some heads, reduced while it is made: the mass of each block of
// keys, and the single keys that get most.
//
// The rows lie in the lanes as in prefill. Scores are made once, and the running sums of their
// exponentials give the mass of the blocks: where no columns are wanted, no more than a block of
// scores is kept. Columns need every row's total first, so the exponentials are kept for them and
// read once more: 4 MiB at 16K keys, 256 bytes a key, for each thread.
#pragma once

#include "rows.h"
#include "tile_operands.h"
#include "top_columns.h"

namespace vllm_sparse {
namespace {

// Where the rows of a unit's heads lie. Strips of rows come after another and the heads within a
// strip, so that the rows that see fewer keys fill whole vectors, which are then left out.
struct RowLanes {
  int heads, rows, width, strips, vectors;

  RowLanes(int64_t num_rows, int num_heads) : heads(num_heads), rows(static_cast<int>(num_rows)) {
    const int lanes = lanes_of_rows(num_rows);
    width = lanes < kLanes ? lanes : kLanes;
    strips = lanes / width;
    vectors = (heads * lanes + kLanes - 1) / kLanes;
  }
  int lane(int head, int row) const {
    return (row / width * heads + head) * width + row % width;
  }
  // The vector that holds a strip of a head's rows.
  int vector(int head, int strip) const { return lane(head, strip * width) / kLanes; }
};

struct RowScratch {
  float* q;         // [D, 64] numbers, or [D / 2, 64] pairs
  float* keys;      // [64, D] where keys are converted
  float* mass;      // [nb, 64] of each block, against the maximum so far
  float* top;       // [nb, 64] that maximum; at the end what makes shares of the row of it
  float* squares;   // [nb, 64]
  float* scores;    // [64 nb, 64] and their exponentials; one block where no columns are wanted
  float* worth;     // [64 nb] of each key as a column
  uint32_t* order;  // [2, 64 nb]

  RowScratch(const RowScores& a, float* scratch) {
    const int64_t blocks = blocks_of(a), head_size = a.shape.head_size;
    q = scratch;
    keys = q + head_size * kTile;
    mass = keys + kBlock * head_size;
    top = mass + blocks * kTile;
    squares = top + blocks * kTile;
    worth = squares + blocks * kTile;
    order = reinterpret_cast<uint32_t*>(worth + blocks * kBlock);
    scores = worth + 3 * blocks * kBlock;
  }
  static int64_t blocks_of(const RowScores& a) { return (a.seq_len + kBlock - 1) / kBlock; }
  static size_t floats(const RowScores& a) {
    const int64_t blocks = blocks_of(a), head_size = a.shape.head_size;
    const int64_t kept = a.num_columns > 0 ? blocks * kBlock : kBlock;
    return head_size * (kTile + kBlock) + 3 * blocks * (kTile + kBlock) +
           (kept + kScoreRows - kBlock) * kTile;
  }
};

struct RowSums {
  Vec top, sum, poison;  // of one vector of rows; poison: 0, NaN once a score was not finite

  // What turns exp(score - top) into a share of the row. Not folded into top: beside logits of
  // 1e4, fp32 has four digits left for the logarithm of a sum.
  Vec inverse() const { return select(sum == 0.0f, Vec{}, 1.0f / sum) + poison; }
};

// Adds a block to the sums of one vector of rows, and notes what it added. With kHide, keys beyond
// `sees` (relative to the block) are hidden from their rows. With `keep`, exponentials replace the
// scores.
template <bool kHide>
inline void add_block(float* scores, int count, IVec sees, bool want_squares, bool keep,
                      RowSums& sums, float* mass, float* block_top, float* block_squares) {
  Vec highest = splat(-kInf);
  Vec poison = sums.poison;
  for (int n = 0; n < count; ++n) {
    Vec x = load(scores + n * kTile);
    if constexpr (kHide) {
      const IVec seen = sees >= n;
      poison += select(seen, x, Vec{}) * 0.0f;
      x = select(seen, x, splat(-kInf));
      store(scores + n * kTile, x);
    } else {
      poison += x * 0.0f;
    }
    highest = max(highest, x);
  }
  const Vec top = max(sums.top, highest);
  // A row that has seen nothing yet has top = -inf; subtracting 0 keeps its scores at -inf.
  const Vec base = select(top == -kInf, Vec{}, top);
  Vec sum = Vec{}, squares = Vec{};
  if (want_squares || keep) {
    for (int n = 0; n < count; ++n) {
      const Vec p = exp(load(scores + n * kTile) - base);
      sum += p;
      squares += p * p;
      store(scores + n * kTile, p);
    }
    if (want_squares) store(block_squares, squares);
  } else {
    for (int n = 0; n < count; ++n) sum += exp(load(scores + n * kTile) - base);
  }
  store(mass, sum);
  store(block_top, base);
  sums.sum = sums.sum * exp(sums.top - base) + sum;
  sums.top = top;
  sums.poison = poison;
}

// From sums against the maximum so far to shares of the row, written out.
inline void write_blocks(const RowScores& a, const RowWork& w, const RowLanes& lanes,
                         const RowScratch& s, const RowSums* sums) {
  const int64_t blocks = RowScratch::blocks_of(a);
  Vec inverse[kVectors];
  for (int c = 0; c < lanes.vectors; ++c) inverse[c] = sums[c].inverse();
  for (int64_t b = 0; b < blocks; ++b) {
    for (int c = 0; c < lanes.vectors; ++c) {
      const int64_t at = b * kTile + c * kLanes;
      const Vec mass = load(s.mass + at);
      // Where there is no mass yet the maximum means nothing.
      const Vec gap = select(mass == 0.0f, Vec{}, load(s.top + at) - sums[c].top);
      const Vec share = exp(gap) * inverse[c];
      store(s.mass + at, mass * share);
      store(s.top + at, share);
      if (a.squares != nullptr) store(s.squares + at, load(s.squares + at) * share * share);
    }
  }
  for (int h = 0; h < w.heads; ++h) {
    for (int r = 0; r < lanes.rows; ++r) {
      const int64_t to = ((w.first + h) * lanes.rows + r) * blocks;
      const int lane = lanes.lane(h, r);
      for (int64_t b = 0; b < blocks; ++b) a.blocks[to + b] = s.mass[b * kTile + lane];
      if (a.squares == nullptr) continue;
      for (int64_t b = 0; b < blocks; ++b) a.squares[to + b] = s.squares[b * kTile + lane];
    }
  }
}

// One strip of a head's rows, for its columns.
struct RowStrip {
  const float* scores;  // exponentials, of key 0
  const float* shares;  // of block 0: what makes shares of the row of them
  IVec until;           // per lane: the first block whose keys are no columns of it
  int32_t farthest;     // the largest of these

  // The mass of a key in each row, 0 where it is no column of the row.
  Vec mass(int64_t key, IVec outside) const {
    const Vec share = load(shares + key / kBlock * kTile);
    return select(outside, Vec{}, load(scores + key * kTile) * share);
  }
  IVec outside(int32_t block, bool has_base) const {
    const IVec all = (IVec{} - 1);
    return has_base && block == 0 ? all : (IVec)(until <= block);
  }
};

// What each key is worth as a column of one head: its heaviest row, or all rows but that one.
template <bool kByHeaviest>
inline void rank_keys(const RowScores& a, const RowStrip* strips, int count, int64_t last_key,
                      float* worth) {
  const bool has_base = a.base_from != nullptr;
  const int64_t blocks = RowScratch::blocks_of(a);
  for (int64_t b = 0; b < blocks; ++b) {
    int used = 0;
    const RowStrip* strip[kVectors];
    IVec outside[kVectors];
    for (int i = 0; i < count; ++i) {
      if (b >= strips[i].farthest || (has_base && b == 0)) continue;
      strip[used] = strips + i;
      outside[used++] = strips[i].outside(static_cast<int32_t>(b), has_base);
    }
    for (int64_t key = b * kBlock; key < (b + 1) * kBlock; key += kLanes) {
      if (used == 0 || key > last_key) {
        store(worth + key, Vec{});
        continue;
      }
      Vec sum[kLanes], most[kLanes];
      for (int n = 0; n < kLanes; ++n) {
        sum[n] = most[n] = Vec{};
        if (key + n > last_key) continue;
        for (int i = 0; i < used; ++i) {
          const Vec p = strip[i]->mass(key + n, outside[i]);
          if constexpr (!kByHeaviest) sum[n] += p;
          most[n] = max(most[n], p);
        }
      }
      transpose(most);
      Vec heaviest = most[0];
      for (int i = 1; i < kLanes; ++i) heaviest = max(heaviest, most[i]);
      if constexpr (!kByHeaviest) {
        transpose(sum);
        Vec total = sum[0];
        for (int i = 1; i < kLanes; ++i) total += sum[i];
        heaviest = total - heaviest;
      }
      // Never negative, never NaN: the bits of such numbers rank as the numbers do.
      store(worth + key, max(heaviest, Vec{}));
    }
  }
}

// The mass of the chosen columns in a head's rows: [R, M].
inline void write_columns(const RowScores& a, const RowStrip* strips, const RowLanes& lanes, int h,
                          int64_t last_key, const int64_t* columns, float* to) {
  const bool has_base = a.base_from != nullptr;
  for (int64_t m = 0; m < a.num_columns; m += kLanes) {
    const int found = static_cast<int>(a.num_columns - m < kLanes ? a.num_columns - m : kLanes);
    for (int i = 0; i < lanes.strips; ++i) {
      Vec p[kLanes] = {};
      for (int n = 0; n < found; ++n) {
        const int64_t key = columns[m + n];
        if (key > last_key) continue;
        const IVec outside = strips[i].outside(static_cast<int32_t>(key / kBlock), has_base);
        bool all = true;
        for (int j = 0; j < kLanes; ++j) all &= outside[j] != 0;
        if (!all) p[n] = strips[i].mass(key, outside);
      }
      transpose(p);
      const int first = i * lanes.width;
      for (int r = first; r < first + lanes.width && r < lanes.rows; ++r) {
        float row[kLanes];
        store(row, p[lanes.lane(h, r) % kLanes]);
        std::memcpy(to + r * a.num_columns + m, row, found * sizeof(float));
      }
    }
  }
}

template <class T>
void row_scores(const RowScores& a, const RowWork& w, float* scratch) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const int64_t kv_head = a.heads[w.first] / (shape.num_heads / shape.num_kv_heads);
  const Rows<T> rows(a.kv, 0, kv_head);
  const RowLanes lanes(a.num_rows, w.heads);
  const RowScratch s(a, scratch);

  // Queries in the lanes, the last key that each lane sees, the first block of its base.
  int64_t sees[kTile];
  int32_t until[kTile] = {};
  for (int i = 0; i < kTile; ++i) sees[i] = -1;
  const T* query[kTile] = {};
  for (int h = 0; h < w.heads; ++h) {
    for (int r = 0; r < lanes.rows; ++r) {
      const int lane = lanes.lane(h, r);
      query[lane] = static_cast<const T*>(a.q) + r * a.q_row_stride +
                    a.heads[w.first + h] * a.q_head_stride;
      sees[lane] = a.positions[r] < a.seq_len ? a.positions[r] : a.seq_len - 1;
      if (sees[lane] < 0) continue;
      int64_t end = sees[lane] / kBlock + 1;
      if (a.base_from != nullptr && a.base_from[r] < end) end = a.base_from[r];
      until[lane] = static_cast<int32_t>(end);
    }
  }
  for (int c = 0; c < lanes.vectors; ++c) {
    Operands<T>::pack_queries(shape, query + c * kLanes, s.q + c * kLanes);
  }
  int64_t vector_sees[kVectors], vector_least[kVectors], last_key = -1;
  for (int c = 0; c < lanes.vectors; ++c) {
    vector_sees[c] = -1;
    vector_least[c] = a.seq_len;
    for (int i = c * kLanes; i < (c + 1) * kLanes; ++i) {
      if (sees[i] > vector_sees[c]) vector_sees[c] = sees[i];
      if (sees[i] < vector_least[c]) vector_least[c] = sees[i];
    }
    if (vector_sees[c] > last_key) last_key = vector_sees[c];
  }

  const int64_t blocks = RowScratch::blocks_of(a);
  std::memset(s.mass, 0, 3 * blocks * kTile * sizeof(float));  // top and squares as well
  RowSums sums[kVectors];
  for (int c = 0; c < lanes.vectors; ++c) sums[c] = {splat(-kInf), Vec{}, Vec{}};
  int64_t position[kBlock];
  const T* keys[kBlock];
  const T* unused[kBlock];
  const auto find = [&](int64_t first) {
    const int64_t left = last_key + 1 - first;
    const int count = static_cast<int>(left < kBlock ? left : kBlock);
    for (int n = 0; n < count; ++n) position[n] = first + n;
    if (count > 0) rows.find(position, count, keys, unused);
    return count;
  };
  int count = find(0);
  for (int64_t first = 0; first <= last_key; first += kBlock) {
    const typename Operands<T>::Step* row[kScoreRows];
    for (int n = 0; n < count; ++n) {
      row[n] = Operands<T>::key(keys[n], head_size, s.keys + n * head_size);
    }
    for (int n = count; n < kScoreRows; ++n) row[n] = row[count - 1];
    const int now = count;
    count = find(first + kBlock);
    Ahead ahead;
    for (int n = 0; n < count; ++n) ahead.row[ahead.count++] = keys[n];
    ahead.bytes = head_size * sizeof(T);
    ahead.step = kKeys;

    int begin = 0;
    while (begin < lanes.vectors && vector_sees[begin] < first) ++begin;
    float* scores = s.scores + (a.num_columns > 0 ? first * kTile : 0);
    score(s.q, row, now, head_size / Operands<T>::kNumbers, begin, lanes.vectors, scores, ahead);
    for (int c = begin; c < lanes.vectors; ++c) {
      scale_scores(scores + c * kLanes, now, Operands<T>::scale(shape));
      const int64_t at = first + c * kLanes;  // first is 64 keys for each block, as kTile is lanes
      const bool want = a.squares != nullptr, keep = a.num_columns > 0;
      if (vector_least[c] >= first + now - 1) {
        add_block<false>(scores + c * kLanes, now, IVec{}, want, keep, sums[c], s.mass + at,
                         s.top + at, s.squares + at);
      } else {
        IVec relative;
        for (int i = 0; i < kLanes; ++i) {
          const int64_t here = sees[c * kLanes + i] - first;
          relative[i] = here < 0 ? -1 : here < kBlock ? static_cast<int32_t>(here) : kBlock;
        }
        add_block<true>(scores + c * kLanes, now, relative, want, keep, sums[c], s.mass + at,
                        s.top + at, s.squares + at);
      }
    }
  }
  write_blocks(a, w, lanes, s, sums);
  if (a.num_columns == 0) return;

  for (int h = 0; h < w.heads; ++h) {
    RowStrip strips[kVectors];
    for (int i = 0; i < lanes.strips; ++i) {
      const int c = lanes.vector(h, i);
      RowStrip& strip = strips[i];
      strip.scores = s.scores + c * kLanes;
      strip.shares = s.top + c * kLanes;
      strip.farthest = 0;
      for (int j = 0; j < kLanes; ++j) {
        // Lanes of other heads have no columns here.
        const int from = lanes.lane(h, i * lanes.width) % kLanes;
        const bool mine = j >= from && j < from + lanes.width;
        strip.until[j] = mine ? until[c * kLanes + j] : 0;
        if (strip.until[j] > strip.farthest) strip.farthest = strip.until[j];
      }
    }
    const int64_t slot = w.first + h;
    const auto rank = a.by_heaviest != 0 ? rank_keys<true> : rank_keys<false>;
    rank(a, strips, lanes.strips, last_key, s.worth);
    int64_t* columns = a.columns + slot * a.num_columns;
    top_columns(s.worth, a.seq_len, a.num_columns, s.order, columns);
    write_columns(a, strips, lanes, h, last_key, columns,
                  a.column_mass + slot * lanes.rows * a.num_columns);
  }
}

}  // namespace
}  // namespace vllm_sparse
