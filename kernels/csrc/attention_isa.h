// The kernels, written once over a vector of kLanes floats and compiled per instruction set.
//
// A tile's 64 queries lie in the lanes: Q is held transposed [D, 64], scores come out as
// [keys, 64], the output accumulates as [D, 64]. Keys and values are then only ever read as
// scalars that the multiply-add broadcasts from memory, so a row of K or V is used where it lies
// in its page, and a single gathered column costs what a key of a whole block costs.
//
// Everything has internal linkage: the linker must never share code between instruction sets.
// The including file defines VLLM_SPARSE_LANES, VLLM_SPARSE_KEYS and VLLM_SPARSE_VECS: the score
// kernel keeps KEYS x VECS accumulators in registers.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention.h"

namespace vllm_sparse {
namespace {

constexpr int kLanes = VLLM_SPARSE_LANES;
constexpr int kKeys = VLLM_SPARSE_KEYS;
constexpr int kVecs = VLLM_SPARSE_VECS;
constexpr int kDims = 4;  // rows of the output tile that the value kernel keeps in registers
constexpr int kStrip = 16;  // head sizes are multiples of it
constexpr int kVectors = kTile / kLanes;
constexpr float kInf = std::numeric_limits<float>::infinity();
static_assert(kVectors % kVecs == 0, "the accumulators must tile the query tile");

typedef float Vec __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2), may_alias));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline Vec splat(float x) { return Vec{} + x; }
inline Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// exp for x <= 0 (and a little above), 0 below -87.3 and for -inf; relative error below 2e-7.
inline Vec exp(Vec x) {
  const Vec lowest = splat(-87.3f);
  const IVec vanishes = x < lowest;
  x = select(vanishes, lowest, x);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);  // Cephes' expf polynomial
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  IVec bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;  // the integer sits in the low mantissa bits
  IVec result;
  std::memcpy(&result, &p, sizeof(result));
  result += bits;
  Vec y;
  std::memcpy(&y, &result, sizeof(y));
  return select(vanishes, Vec{}, y);
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  // Rebias by a multiplication, which also normalises subnormals.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float y = bits_to_float(magnitude) * 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) y = bits_to_float(magnitude | 0x7f800000);
  return bits_to_float(float_to_bits(y) | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BFloat16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  out->bits = static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
}
inline void from_float(float x, Float16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds beyond the largest finite half
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the float adder do the rounding
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// kLanes stored numbers as fp32, whatever their alignment.
inline UVec load_bits(const void* p) {
  HalfVec bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, UVec);
}
inline Vec as_floats(UVec bits) {
  Vec v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
inline Vec load_row(const float* p) { return load(p); }
inline Vec load_row(const BFloat16* p) { return as_floats(load_bits(p) << 16); }
inline Vec load_row(const Float16* p) {
  const UVec bits = load_bits(p);
  const UVec magnitude = (bits & 0x7fff) << 13;
  UVec y;
  const Vec scaled = as_floats(magnitude) * 0x1p112f;
  std::memcpy(&y, &scaled, sizeof(y));
  const UVec special = magnitude | 0x7f800000;
  const UVec is_special = (bits & 0x7c00) == 0x7c00;
  y = (y & ~is_special) | (special & is_special);
  return as_floats(y | (bits & 0x8000) << 16);
}

template <class T>
inline void convert_row(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load_row(from + i));
}

// Finds the rows of one sequence and KV head in the pages.
template <class T>
struct Rows {
  const T* k;
  const T* v;
  const PagedKV& kv;
  const int32_t* table;

  Rows(const PagedKV& kv, int64_t seq, int64_t kv_head)
      : k(static_cast<const T*>(kv.k) + kv_head * kv.k_head_stride),
        v(static_cast<const T*>(kv.v) + kv_head * kv.v_head_stride),
        kv(kv),
        table(kv.block_table + seq * kv.table_stride) {}

  const T* key(int64_t position) const {
    const int64_t page = table[position / kv.page_size];
    return k + page * kv.k_page_stride + position % kv.page_size * kv.k_row_stride;
  }
  const T* value(int64_t position) const {
    const int64_t page = table[position / kv.page_size];
    return v + page * kv.v_page_stride + position % kv.page_size * kv.v_row_stride;
  }
};

constexpr int kScoreRows = (kBlock + kKeys - 1) / kKeys * kKeys;  // the last group may be padded

// State of one query tile of one head, in scratch memory.
struct TileState {
  float* q;       // [D, 64], scaled
  float* out;     // [D, 64], not normalised
  float* scores;  // [kScoreRows, 64]
  float* top;     // [64] running maximum
  float* sum;     // [64] running denominator
  float* values;  // [D / 16, 64, 16] the block's values in fp32
  float* keys;    // [64, D] the block's keys in fp32; unused where the cache is fp32
  int64_t head_size;

  TileState(float* scratch, int64_t head_size) : head_size(head_size) {
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

// Hides keys[n] from the queries that stand before it. position[n] is relative to the first query.
inline void mask_causal(const TileState& s, const int64_t* position, int count) {
  IVec lane0;
  for (int i = 0; i < kLanes; ++i) lane0[i] = i;
  for (int n = 0; n < count; ++n) {
    if (position[n] <= 0) continue;
    const int32_t p = static_cast<int32_t>(position[n]);
    for (int c = 0; c < kVectors; ++c) {
      float* score = s.scores + n * kTile + c * kLanes;
      const IVec sees = (lane0 + c * kLanes) >= p;
      store(score, select(sees, load(score), splat(-kInf)));
    }
  }
}

// Turns scores into probabilities against the running maximum, rescaling what came before.
inline void softmax_step(const TileState& s, int count) {
  for (int c = 0; c < kVectors; ++c) {
    float* scores = s.scores + c * kLanes;
    Vec highest = load(scores);
    for (int n = 1; n < count; ++n) highest = max(highest, load(scores + n * kTile));
    const Vec before = load(s.top + c * kLanes);
    const Vec top = max(before, highest);
    // A query that has seen nothing yet has top = -inf; subtracting 0 keeps its scores at -inf.
    const Vec base = select(top == -kInf, Vec{}, top);
    Vec sum = Vec{};
    for (int n = 0; n < count; ++n) {
      const Vec p = exp(load(scores + n * kTile) - base);
      store(scores + n * kTile, p);
      sum += p;
    }
    const IVec grew = top > before;
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any |= grew[i] != 0;
    Vec total = load(s.sum + c * kLanes);
    if (any) {
      const Vec shrink = exp(before - base);
      total *= shrink;
      float* out = s.out + c * kLanes;
      for (int64_t d = 0; d < s.head_size; ++d) store(out + d * kTile, load(out + d * kTile) * shrink);
      store(s.top + c * kLanes, top);
    }
    store(s.sum + c * kLanes, total + sum);
  }
}

// Up to 64 keys of the sequence.
struct Keys {
  int64_t position[kBlock];
  int count = 0;

  void add(int64_t key) { position[count++] = key; }
};

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

// Hands out a tile's selection, at most 64 keys at a time: its blocks, then its columns.
class Selection {
 public:
  Selection(const Prefill& a, const TileWork& w, int64_t last_query) : last_query_(last_query) {
    if (a.blocks == nullptr) {
      blocks_left_ = last_query / kBlock + 1;
      return;
    }
    blocks_ = a.blocks + a.block_offsets[w.list_row];
    blocks_left_ = a.block_offsets[w.list_row + 1] - a.block_offsets[w.list_row];
    columns_ = a.columns + a.column_offsets[w.list_row];
    columns_left_ = a.column_offsets[w.list_row + 1] - a.column_offsets[w.list_row];
  }

  // Leaves keys.count at 0 when there is nothing more.
  void next(Keys& keys) {
    keys.count = 0;
    while (blocks_left_ > 0 && keys.count == 0) {
      --blocks_left_;
      const int64_t block = blocks_ == nullptr ? dense_block_++ : *blocks_++;
      if (block < 0) continue;
      const int64_t end = (block + 1) * kBlock;
      for (int64_t key = block * kBlock; key < end && key <= last_query_; ++key) keys.add(key);
    }
    if (keys.count > 0) return;
    while (columns_left_ > 0 && keys.count < kBlock) {
      --columns_left_;
      const int64_t column = *columns_++;
      if (column >= 0 && column <= last_query_) keys.add(column);
    }
  }

 private:
  const int64_t last_query_;
  const int32_t* blocks_ = nullptr;
  const int32_t* columns_ = nullptr;
  int64_t blocks_left_ = 0;
  int64_t columns_left_ = 0;
  int64_t dense_block_ = 0;
};

template <class T>
void prefill_tile(const Prefill& a, const TileWork& w, float* scratch) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const int64_t begin = a.query_start_loc[w.seq] + w.tile_in_seq * kTile;
  const int64_t end = a.query_start_loc[w.seq + 1];
  const int rows_in_tile = static_cast<int>(end - begin < kTile ? end - begin : kTile);
  const int64_t first_query = a.seq_lens[w.seq] - (end - begin);
  const int64_t last_query = first_query + rows_in_tile - 1;
  const TileState s(scratch, head_size);
  const Rows<T> rows(a.kv, w.seq, w.head / (shape.num_heads / shape.num_kv_heads));

  const T* q = static_cast<const T*>(a.q) + begin * a.q_row_stride + w.head * a.q_head_stride;
  for (int64_t d = 0; d < head_size; ++d) {
    for (int r = 0; r < kTile; ++r) {
      s.q[d * kTile + r] =
          r < rows_in_tile ? to_float(q[r * a.q_row_stride + d]) * shape.scale : 0.0f;
    }
  }
  std::memset(s.out, 0, head_size * kTile * sizeof(float));
  std::memset(s.sum, 0, kTile * sizeof(float));
  for (int r = 0; r < kTile; ++r) s.top[r] = -kInf;

  Selection selection(a, w, last_query);
  Keys now, next;
  selection.next(now);
  while (now.count > 0) {
    selection.next(next);
    attend(s, rows, now, next, first_query);
    now = next;
  }

  T* out = static_cast<T*>(a.out) + begin * a.out_row_stride + w.head * a.out_head_stride;
  for (int r = 0; r < rows_in_tile; ++r) {
    const float sum = s.sum[r];
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int64_t d = 0; d < head_size; ++d) {
      from_float(s.out[d * kTile + r] * inverse, out + r * a.out_row_stride + d);
    }
    a.lse[(begin + r) * shape.num_heads + w.head] = sum > 0.0f ? s.top[r] + std::log(sum) : -kInf;
  }
}

inline float horizontal_sum(Vec v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width >= 4; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// scores[g, n] = q[g] . k for `kGroup` query heads and one key.
template <int kGroup, class T>
inline void decode_score(const float* q, const T* k, int64_t head_size, float* scores) {
  Vec acc[kGroup] = {};
  for (int64_t d = 0; d < head_size; d += kLanes) {
    const Vec x = load_row(k + d);
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g) acc[g] += load(q + g * head_size + d) * x;
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGroup; ++g) scores[g * kBlock] = horizontal_sum(acc[g]);
}

// out[g, :] += sum_n scores[g, n] * values[n] for `kGroup` query heads.
template <int kGroup, class T>
inline void decode_accumulate(const float* scores, const T* const* values, int count,
                              int64_t head_size, float* out) {
  for (int64_t d = 0; d < head_size; d += kStrip) {
    constexpr int kSteps = kStrip / kLanes;
    Vec acc[kGroup][kSteps];
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int j = 0; j < kSteps; ++j) acc[g][j] = load(out + g * head_size + d + j * kLanes);
    for (int n = 0; n < count; ++n) {
#pragma GCC unroll 8
      for (int j = 0; j < kSteps; ++j) {
        const Vec x = load_row(values[n] + d + j * kLanes);
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g) acc[g][j] += scores[g * kBlock + n] * x;
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int j = 0; j < kSteps; ++j) store(out + g * head_size + d + j * kLanes, acc[g][j]);
  }
}

// Turns one head's 64 scores into probabilities against its running maximum.
inline void decode_softmax_step(float* scores, float* top, float* sum, float* out,
                                int64_t head_size) {
  Vec highest = load(scores);
  for (int n = kLanes; n < kBlock; n += kLanes) highest = max(highest, load(scores + n));
  float new_top = *top;
  for (int i = 0; i < kLanes; ++i) new_top = highest[i] > new_top ? highest[i] : new_top;
  const float base = new_top == -kInf ? 0.0f : new_top;
  Vec total = Vec{};
  for (int n = 0; n < kBlock; n += kLanes) {
    const Vec p = exp(load(scores + n) - base);
    store(scores + n, p);
    total += p;
  }
  if (new_top > *top) {
    const float shrink = std::exp(*top - base);
    *sum *= shrink;
    for (int64_t d = 0; d < head_size; ++d) out[d] *= shrink;
    *top = new_top;
  }
  *sum += horizontal_sum(total);
}

// Partial attention of the G query heads of a KV head over keys [first_key, last_key).
template <class T>
void decode_split(const Decode& a, const SplitWork& w, float* scratch) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const int group = static_cast<int>(shape.num_heads / shape.num_kv_heads);
  const Rows<T> rows(a.kv, w.seq, w.kv_head);
  float* q = scratch;                  // [G, D], scaled
  float* scores = q + group * head_size;  // [G, 64]
  float* top = scores + group * kBlock;   // [G]
  float* sum = top + group;               // [G]
  for (int g = 0; g < group; ++g) {
    const T* from = static_cast<const T*>(a.q) + w.seq * a.q_row_stride +
                    (w.kv_head * group + g) * a.q_head_stride;
    for (int64_t d = 0; d < head_size; ++d) q[g * head_size + d] = to_float(from[d]) * shape.scale;
    top[g] = -kInf;
    sum[g] = 0.0f;
  }
  std::memset(w.out, 0, group * head_size * sizeof(float));

  for (int64_t first = w.first_key; first < w.last_key; first += kBlock) {
    const int count = static_cast<int>(w.last_key - first < kBlock ? w.last_key - first : kBlock);
    const T* values[kBlock];
    for (int n = 0; n < count; ++n) {
      const T* k = rows.key(first + n);
      values[n] = rows.value(first + n);
      int g = 0;
      for (; g + 4 <= group; g += 4) {
        decode_score<4>(q + g * head_size, k, head_size, scores + g * kBlock + n);
      }
      for (; g < group; ++g) {
        decode_score<1>(q + g * head_size, k, head_size, scores + g * kBlock + n);
      }
    }
    for (int g = 0; g < group; ++g) {
      for (int n = count; n < kBlock; ++n) scores[g * kBlock + n] = -kInf;
      decode_softmax_step(scores + g * kBlock, top + g, sum + g, w.out + g * head_size, head_size);
    }
    int g = 0;
    for (; g + 4 <= group; g += 4) {
      decode_accumulate<4>(scores + g * kBlock, values, count, head_size, w.out + g * head_size);
    }
    for (; g < group; ++g) {
      decode_accumulate<1>(scores + g * kBlock, values, count, head_size, w.out + g * head_size);
    }
  }
  for (int g = 0; g < group; ++g) {
    const float inverse = sum[g] > 0.0f ? 1.0f / sum[g] : 0.0f;
    for (int64_t d = 0; d < head_size; ++d) w.out[g * head_size + d] *= inverse;
    w.lse[g] = sum[g] > 0.0f ? top[g] + std::log(sum[g]) : -kInf;
  }
}

template <class T>
void decode_merge(const Decode& a, int64_t seq, int64_t kv_head, const float* parts_out,
                  const float* parts_lse, int64_t parts) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    float top = -kInf;
    for (int64_t p = 0; p < parts; ++p) top = std::fmax(top, parts_lse[p * group + g]);
    const float base = top == -kInf ? 0.0f : top;
    float sum = 0.0f;
    for (int64_t p = 0; p < parts; ++p) sum += std::exp(parts_lse[p * group + g] - base);
    T* out = static_cast<T*>(a.out) + seq * a.out_row_stride + head * a.out_head_stride;
    for (int64_t d = 0; d < head_size; ++d) {
      float value = 0.0f;
      for (int64_t p = 0; p < parts; ++p) {
        value += std::exp(parts_lse[p * group + g] - base) * parts_out[(p * group + g) * head_size + d];
      }
      from_float(sum > 0.0f ? value / sum : 0.0f, out + d);
    }
    a.lse[seq * shape.num_heads + head] = sum > 0.0f ? base + std::log(sum) : -kInf;
  }
}

size_t prefill_scratch(const Shape& shape) { return TileState::floats(shape.head_size); }

size_t decode_scratch(const Shape& shape) {
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  return group * (shape.head_size + kBlock + 2);
}

void prefill_tile_any(const Prefill& a, const TileWork& w, float* scratch) {
  switch (a.shape.dtype) {
    case kFloat32: return prefill_tile<float>(a, w, scratch);
    case kBFloat16: return prefill_tile<BFloat16>(a, w, scratch);
    case kFloat16: return prefill_tile<Float16>(a, w, scratch);
  }
}

void decode_split_any(const Decode& a, const SplitWork& w, float* scratch) {
  switch (a.shape.dtype) {
    case kFloat32: return decode_split<float>(a, w, scratch);
    case kBFloat16: return decode_split<BFloat16>(a, w, scratch);
    case kFloat16: return decode_split<Float16>(a, w, scratch);
  }
}

void decode_merge_any(const Decode& a, int64_t seq, int64_t kv_head, const float* out,
                      const float* lse, int64_t parts) {
  switch (a.shape.dtype) {
    case kFloat32: return decode_merge<float>(a, seq, kv_head, out, lse, parts);
    case kBFloat16: return decode_merge<BFloat16>(a, seq, kv_head, out, lse, parts);
    case kFloat16: return decode_merge<Float16>(a, seq, kv_head, out, lse, parts);
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name,           prefill_scratch,  prefill_tile_any,
          decode_scratch, decode_split_any, decode_merge_any};
}

}  // namespace
}  // namespace vllm_sparse
