// Sums and maxima over the lanes of vectors.
#pragma once

#include "vec.h"

namespace vllm_sparse {
namespace {

typedef float Quad __attribute__((vector_size(16), may_alias));

// Four partial sums of a vector's lanes.
inline Quad fold(Vec v) {
  Quad part[kLanes / 4];
  std::memcpy(part, &v, sizeof(v));
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

inline float horizontal_sum(Vec v) {
  const Quad q = fold(v);
  return (q[0] + q[1]) + (q[2] + q[3]);
}

inline float horizontal_max(Vec v) {
  Quad part[kLanes / 4];
  std::memcpy(part, &v, sizeof(v));
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
  }
  const float a = part[0][0] > part[0][1] ? part[0][0] : part[0][1];
  const float b = part[0][2] > part[0][3] ? part[0][2] : part[0][3];
  return a > b ? a : b;
}

// The sums of the lanes of four vectors.
inline Quad sums(Vec a, Vec b, Vec c, Vec d) {
  const Quad w = fold(a), x = fold(b), y = fold(c), z = fold(d);
  const Quad wx = __builtin_shufflevector(w, x, 0, 4, 2, 6) + __builtin_shufflevector(w, x, 1, 5, 3, 7);
  const Quad yz = __builtin_shufflevector(y, z, 0, 4, 2, 6) + __builtin_shufflevector(y, z, 1, 5, 3, 7);
  return __builtin_shufflevector(wx, yz, 0, 1, 4, 5) + __builtin_shufflevector(wx, yz, 2, 3, 6, 7);
}

#if defined(__AVX512F__)

// Lane j of the result is the sum of the lanes of v[j]. 45 instructions for what takes `sums`,
// called four times, a hundred.
__attribute__((always_inline)) inline Vec sums_of_16(const Vec* v) {
  __m512 pair[8], four[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const __m512 x = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                                 _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const __m512 y = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                                 _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  return (Vec)_mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

#endif

}  // namespace
}  // namespace vllm_sparse
