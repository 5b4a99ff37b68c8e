// What a query tile's products are made of: fp32 numbers, or pairs of bfloat16 where the CPU
// multiplies such. A step of a product is a number or a pair; it is broadcast, and the queries (or
// their probabilities) lie in the lanes.
#pragma once

#include <type_traits>

#include "left_out.h"
#include "pairs.h"
#include "rows.h"
#include "score_tile.h"
#include "softmax_tile.h"

namespace vllm_sparse {
namespace {

// What the heads share while they attend to the same keys, in scratch memory.
struct SharedBlock {
  float* scores;  // [kScoreRows, 64]
  float* values;  // [D / 16, rows, 16] steps
  float* keys;    // [64, D] keys or means
  int64_t head_size;

  SharedBlock(float* scratch, int64_t head_size) : head_size(head_size) {
    scores = scratch;
    values = scores + kScoreRows * kTile;
    keys = values + head_size * kBlock;
  }
  static size_t floats(int64_t head_size) { return kScoreRows * kTile + 2 * kBlock * head_size; }
};

// Rows of T as fp32 numbers. Values are copied to where `accumulate` reads them: in the page the
// rows of a strip of 16 dims lie 2 D floats apart, which maps them to a handful of L1 sets, and
// reading them there cost 20% of the whole kernel at D = 128.
template <class T>
struct Operands {
  using Step = float;
  static constexpr int kNumbers = 1;  // of a step

  // On the scores; queries are scaled before they are stored.
  static float scale(const Shape&) { return 1.0f; }

  // A vector of queries into a column of [D, 64]; null is a query of zeros.
  static void pack_queries(const Shape& shape, const T* const* queries, float* to) {
    for (int64_t d = 0; d < shape.head_size; d += kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = queries[i] != nullptr ? load_row(queries[i] + d) * shape.scale : Vec{};
      }
      transpose(r);
      for (int i = 0; i < kLanes; ++i) store(to + (d + i) * kTile, r[i]);
    }
  }

  // Where a key lies, or what it was converted to, in `room`.
  static const Step* key(const T* row, int64_t head_size, float* room) {
    if constexpr (std::is_same_v<T, float>) {
      return row;
    } else {
      convert_row(row, room, head_size);
      return room;
    }
  }

  static void pack_values(const SharedBlock& s, const T* const* rows, int count) {
    for (int n = 0; n < count; ++n) {
      for (int64_t strip = 0; strip < s.head_size / kStrip; ++strip) {
        convert_row(rows[n] + strip * kStrip, s.values + (strip * kBlock + n) * kStrip, kStrip);
      }
    }
  }

  // Probabilities as steps; returns how many rows of them.
  static int pack_probabilities(float*, int count) { return count; }

  // Means of what is left out, as keys and values; returns how many.
  static int means(const Prefill& a, const TileWork& w, const Rows<T>& rows, LeftOut& left,
                   const SharedBlock& s, const Step** row, float* log_count) {
    const int count = mean_rows(a, w, rows, left, s.keys, s.values, kStrip, kBlock * kStrip,
                                log_count);
    for (int n = 0; n < count; ++n) row[n] = s.keys + n * s.head_size;
    return count;
  }
};

#if defined(__AVX512BF16__)

// Rows of bfloat16 as pairs: of neighbouring dims in queries and keys, which are read where they
// lie, of neighbouring keys in values and probabilities. These are rounded, as in other flash
// kernels; products are exact.
template <>
struct Operands<BFloat16> {
  using Step = Pair;
  static constexpr int kNumbers = 2;

  static float scale(const Shape& shape) { return shape.scale; }

  // [D / 2, 64] pairs.
  static void pack_queries(const Shape& shape, const BFloat16* const* queries, float* to) {
    for (int64_t d = 0; d < shape.head_size; d += 2 * kLanes) {
      Vec r[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        r[i] = queries[i] != nullptr ? load_pairs(queries[i], d, shape.head_size) : Vec{};
      }
      transpose(r);
      for (int i = 0; i < kLanes && d + 2 * i < shape.head_size; ++i) {
        store(to + (d / 2 + i) * kTile, r[i]);
      }
    }
  }

  static const Step* key(const BFloat16* row, int64_t, float*) {
    return reinterpret_cast<const Pair*>(row);
  }

  static void pack_values(const SharedBlock& s, const BFloat16* const* rows, int count) {
    for (int n = 0; n < count; n += 2) {
      for (int64_t d = 0; d < s.head_size; d += kStrip) {
        // What has no partner is paired with zeros: probabilities are zeros there, and the page
        // may hold anything.
        const __m256i low = load_strip(rows[n] + d);
        const __m256i high = n + 1 < count ? load_strip(rows[n + 1] + d) : __m256i{};
        const __m512i pairs = _mm512_or_si512(
            _mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        store(s.values + (d * kBlock / 2 + n / 2 * kStrip), (Vec)pairs);
      }
    }
  }

  static int pack_probabilities(float* p, int count) {
    for (int n = 0; n < count; n += 2) {
      for (int c = 0; c < kTile; c += kLanes) {
        const Vec high = n + 1 < count ? load(p + (n + 1) * kTile + c) : Vec{};
        store(p + n / 2 * kTile + c, pair_lanes(load(p + n * kTile + c), high));
      }
    }
    return (count + 1) / 2;
  }

  static int means(const Prefill& a, const TileWork& w, const Rows<BFloat16>& rows, LeftOut& left,
                   const SharedBlock& s, const Step** row, float* log_count) {
    BFloat16* keys = reinterpret_cast<BFloat16*>(s.keys);
    BFloat16* values = keys + kBlock * s.head_size;
    const int count = mean_rows(a, w, rows, left, keys, values, s.head_size, kStrip, log_count);
    const BFloat16* value[kBlock];
    for (int n = 0; n < count; ++n) {
      row[n] = reinterpret_cast<const Pair*>(keys + n * s.head_size);
      value[n] = values + n * s.head_size;
    }
    pack_values(s, value, count);
    return count;
  }

 private:
  static __m256i load_strip(const BFloat16* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
};

#endif

}  // namespace
}  // namespace vllm_sparse
