// Rows of eight-bit integers as floats; their scales are applied to scores and weights.
#pragma once

#include "vec.h"

namespace vllm_sparse {
namespace {

struct Int8 {
  int8_t value;
};

inline float to_float(Int8 x) { return x.value; }

inline Vec load_row(const Int8* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Vec);
#endif
}

}  // namespace
}  // namespace vllm_sparse
