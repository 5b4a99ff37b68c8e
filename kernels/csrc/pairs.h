// Pairs of bfloat16 numbers, which CPUs with AVX512_BF16 multiply and add up in one step: products
// are exact, sums fp32, twice as many in an instruction as of fp32 numbers.
#pragma once

#include "vec.h"

namespace vllm_sparse {
namespace {

// Two neighbours of a row, or the numbers of two rows.
struct Pair {
  BFloat16 low, high;
};

// acc + y * x in each lane.
inline Vec add_product(Vec acc, Vec x, float y) { return acc + y * x; }

#if defined(__AVX512BF16__)

// acc + the products of pairs, both numbers of each.
inline Vec add_pair_products(Vec acc, Vec x, Vec y) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)y);
}

// acc + y.low * the lower numbers of x + y.high * the upper ones.
inline Vec add_product(Vec acc, Vec x, Pair y) {
  int32_t bits;
  std::memcpy(&bits, &y, sizeof(bits));
  return add_pair_products(acc, x, (Vec)_mm512_set1_epi32(bits));
}

// 32 numbers of a row from dimension d on, zeros beyond head_size, a multiple of 16.
inline Vec load_pairs(const BFloat16* row, int64_t d, int64_t head_size) {
  const __mmask32 inside = head_size - d >= 32 ? ~0u : 0xffffu;
  return (Vec)_mm512_maskz_loadu_epi16(inside, row + d);
}

// Pairs of the numbers of two rows, by dimension: the first 16, and the others.
inline Vec first_pairs(Vec low, Vec high) {
  const __m512i order = _mm512_set_epi16(
      47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
      39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return (Vec)_mm512_permutex2var_epi16((__m512i)low, order, (__m512i)high);
}
inline Vec second_pairs(Vec low, Vec high) {
  const __m512i order = _mm512_set_epi16(
      63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24,
      55, 23, 54, 22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return (Vec)_mm512_permutex2var_epi16((__m512i)low, order, (__m512i)high);
}

// 32 numbers rounded to bfloat16, and neighbours made pairs.
inline void store_pairs(Pair* to, Vec first, Vec second) {
  const __m512bh bits = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  std::memcpy(to, &bits, sizeof(bits));
}

// Pairs of two vectors' lanes, rounded to bfloat16.
inline Vec pair_lanes(Vec low, Vec high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
      23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, both);
}

#endif

}  // namespace
}  // namespace vllm_sparse
