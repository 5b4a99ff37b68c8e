// The products of decode: scores of up to 64 keys, and sums of their values, for the query heads of
// one KV head. Lanes lie along the head size, so rows are read where they lie.
#pragma once

#include <type_traits>

#include "lane_sums.h"
#include "pairs.h"

namespace vllm_sparse {
namespace {

// Query heads whose accumulators fit the registers beside what is read.
constexpr int kDecodeHeads = kLanes == 16 ? 4 : 2;

// Calls step(first head, integral constant of how many) over the group, most heads at a time first.
template <class Step>
inline void for_heads(int group, const Step& step) {
  int g = 0;
  for (; kDecodeHeads >= 4 && g + 4 <= group; g += 4) step(g, std::integral_constant<int, 4>());
  for (; g + 2 <= group; g += 2) step(g, std::integral_constant<int, 2>());
  for (; g < group; ++g) step(g, std::integral_constant<int, 1>());
}

// Rows of T widened to fp32 in registers.
template <class T>
struct Widening {
  static constexpr int kStep = kLanes;  // dims of a vector
  static Vec key(const T* row, int64_t d, int64_t) { return load_row(row + d); }
  static Vec query(const float* q, int64_t d, int64_t) { return load(q + d); }
  static Vec add(Vec acc, Vec x, Vec y) { return acc + x * y; }
};

// scores[g, n] = scale q[g] . keys[n] for `kGroup` query heads and `count` keys, and for what
// `keys` has beyond, up to 16 at a time. ahead(n) is called before keys n .. n + 3, to fetch what
// comes later.
template <int kGroup, class Products, class T, class Q, class Ahead>
inline void score_products(const Q* q, const T* const* keys, int count, int64_t head_size,
                           float scale, float* scores, const Ahead& ahead) {
  constexpr int kRows = kLanes == 16 ? 16 / kGroup : 4;
  for (int n = 0; n < count; n += kRows) {
    for (int i = n; i < n + kRows; i += 4) ahead(i);
    Vec acc[kGroup * kRows] = {};
    for (int64_t d = 0; d < head_size; d += Products::kStep) {
      Vec y[kGroup];
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) y[g] = Products::query(q + g * head_size, d, head_size);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec x = Products::key(keys[n + i], d, head_size);
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; ++g) {
          acc[g * kRows + i] = Products::add(acc[g * kRows + i], x, y[g]);
        }
      }
    }
#if defined(__AVX512F__)
    float sum[16];
    store(sum, sums_of_16(acc) * scale);
    for (int g = 0; g < kGroup; ++g) {
      std::memcpy(scores + g * kBlock + n, sum + g * kRows, kRows * sizeof(float));
    }
#else
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
      const Vec* of = acc + g * kRows;
      const Quad four = sums(of[0], of[1], of[2], of[3]) * scale;
      std::memcpy(scores + g * kBlock + n, &four, sizeof(four));
    }
#endif
  }
}

template <int kGroup, class T, class Ahead>
inline void decode_score(const float* q, const T* const* keys, int count, int64_t head_size,
                         float* scores, const Ahead& ahead) {
  score_products<kGroup, Widening<T>>(q, keys, count, head_size, 1.0f, scores, ahead);
}

// out[g, d ..] += sum_n scores[g, n] * values[n, d ..] for `kGroup` heads and `kSteps` vectors.
// ahead(n, d, dims) is called before these dims of a value, to fetch what comes later.
template <int kGroup, int kSteps, class T, class Ahead>
inline void decode_accumulate_strip(const float* scores, const T* const* values, int count,
                                    int64_t head_size, int64_t d, float* out, const Ahead& ahead) {
  Vec acc[kGroup][kSteps];
#pragma GCC unroll 4
  for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) acc[g][j] = load(out + g * head_size + d + j * kLanes);
  for (int n = 0; n < count; ++n) {
    ahead(n, d, kSteps * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) {
      const Vec x = load_row(values[n] + d + j * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) acc[g][j] += scores[g * kBlock + n] * x;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) store(out + g * head_size + d + j * kLanes, acc[g][j]);
}

template <int kGroup, class T, class Ahead>
inline void decode_accumulate(const float* scores, const T* const* values, int count,
                              int64_t head_size, float* out, const Ahead& ahead) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= head_size; d += 2 * kLanes) {
    decode_accumulate_strip<kGroup, 2>(scores, values, count, head_size, d, out, ahead);
  }
  if (d < head_size) {
    decode_accumulate_strip<kGroup, 1>(scores, values, count, head_size, d, out, ahead);
  }
}

// What the products of scores are made of: rows widened to fp32, or pairs.
template <class T>
struct ScoreProducts : Widening<T> {};

// What decode's products are made of: here rows widened to fp32, and queries scaled.
template <class T>
struct DecodeOperands {
  using Query = float;

  static void take_query(const Shape& shape, const T* from, Query* to) {
    for (int64_t d = 0; d < shape.head_size; ++d) to[d] = to_float(from[d]) * shape.scale;
  }

  template <int kGroup, class Ahead>
  static void score(const Shape& shape, const Query* q, const T* const* keys, int count,
                    float* scores, const Ahead& ahead) {
    decode_score<kGroup>(q, keys, count, shape.head_size, scores, ahead);
  }

  template <int kGroup, class Ahead>
  static void accumulate(float* p, const T* const* values, int count, int64_t head_size,
                         float* out, const Ahead& ahead) {
    decode_accumulate<kGroup>(p, values, count, head_size, out, ahead);
  }
};

#if defined(__AVX512BF16__)

struct Pairing {
  static constexpr int kStep = 2 * kLanes;
  static Vec key(const BFloat16* row, int64_t d, int64_t head_size) {
    return load_pairs(row, d, head_size);
  }
  static Vec query(const BFloat16* q, int64_t d, int64_t head_size) {
    return load_pairs(q, d, head_size);
  }
  static Vec add(Vec acc, Vec x, Vec y) { return add_pair_products(acc, x, y); }
};

template <>
struct ScoreProducts<BFloat16> : Pairing {};

// Rows of bfloat16 as pairs: of neighbouring dims in scores, of neighbouring keys in the sums of
// values, whose probabilities are rounded, as in other flash kernels.
template <>
struct DecodeOperands<BFloat16> {
  using Query = BFloat16;

  static void take_query(const Shape& shape, const BFloat16* from, Query* to) {
    std::memcpy(to, from, shape.head_size * sizeof(Query));
  }

  template <int kGroup, class Ahead>
  static void score(const Shape& shape, const Query* q, const BFloat16* const* keys, int count,
                    float* scores, const Ahead& ahead) {
    score_products<kGroup, Pairing>(q, keys, count, shape.head_size, shape.scale, scores, ahead);
  }

  // Probabilities are made pairs where they lie.
  template <int kGroup, class Ahead>
  static void accumulate(float* p, const BFloat16* const* values, int count, int64_t head_size,
                         float* out, const Ahead& ahead) {
    for (int g = 0; g < kGroup; ++g) {
      float* row = p + g * kBlock;
      for (int n = 0; n < kBlock; n += 2 * kLanes) {
        store_pairs(reinterpret_cast<Pair*>(row + n / 2), load(row + n), load(row + n + kLanes));
      }
    }
    // Two vectors of dims for four heads, four for fewer: sums that wait for each other less.
    constexpr int kSteps = kGroup == 4 ? 1 : 2;
    int64_t d = 0;
    for (; d + kSteps * 32 <= head_size; d += kSteps * 32) {
      accumulate_strip<kGroup, kSteps>(p, values, count, head_size, d, out, ahead);
    }
    for (; d < head_size; d += 32) {
      accumulate_strip<kGroup, 1>(p, values, count, head_size, d, out, ahead);
    }
  }

 private:
  template <int kGroup, int kSteps, class Ahead>
  static void accumulate_strip(const float* p, const BFloat16* const* values, int count,
                               int64_t head_size, int64_t d, float* out, const Ahead& ahead) {
    const Pair* weights = reinterpret_cast<const Pair*>(p);
    Vec acc[kGroup][2 * kSteps];
    const auto inside = [&](int j) { return d + j * kLanes < head_size; };
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 4
      for (int j = 0; j < 2 * kSteps; ++j) {
        acc[g][j] = inside(j) ? load(out + g * head_size + d + j * kLanes) : Vec{};
      }
    for (int n = 0; n < count; n += 2) {
      ahead(n, d, kSteps * 32);
      ahead(n + 1, d, kSteps * 32);
#pragma GCC unroll 2
      for (int j = 0; j < kSteps; ++j) {
        const Vec low = load_pairs(values[n], d + j * 32, head_size);
        // The last one may have no partner: a probability of zero does not make a row harmless.
        const Vec high = n + 1 < count ? load_pairs(values[n + 1], d + j * 32, head_size) : Vec{};
        const Vec first = first_pairs(low, high), second = second_pairs(low, high);
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; ++g) {
          const Pair y = weights[g * kBlock + n / 2];
          acc[g][2 * j] = add_product(acc[g][2 * j], first, y);
          acc[g][2 * j + 1] = add_product(acc[g][2 * j + 1], second, y);
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 4
      for (int j = 0; j < 2 * kSteps; ++j) {
        if (inside(j)) store(out + g * head_size + d + j * kLanes, acc[g][j]);
      }
  }
};

#endif

}  // namespace
}  // namespace vllm_sparse
