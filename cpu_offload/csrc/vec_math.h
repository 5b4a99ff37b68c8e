// Vector functions that sampling needs beside those of kernels/csrc/vec.h.
#pragma once

#include "decode_softmax.h"
#include "vec.h"

namespace vllm_sparse {
namespace {

// A bit for each lane of a mask.
inline uint32_t lanes_of(IVec mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// sums[i] = x[0] + .. + x[i], of 16 numbers.
inline void running_sums(const float* x, float* sums) {
#if VLLM_SPARSE_LANES == 16
  const Vec zero = {};
  Vec v = load(x);
  v += __builtin_shufflevector(zero, v, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29,
                               30);
  v += __builtin_shufflevector(zero, v, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
                               29);
  v += __builtin_shufflevector(zero, v, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26,
                               27);
  v += __builtin_shufflevector(zero, v, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                               23);
  store(sums, v);
#else
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sums[i] = sum += x[i];
#endif
}

// 2^x for x <= 0, to 1e-4 of it and no less than 2^-126: for what only decides which rows are read.
// Half the instructions of exp.
inline Vec exp2_rough(Vec x) {
  x = max(x, splat(-126.0f));
#if defined(__AVX512F__)
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + magic;
  const Vec n = shifted - magic;
#endif
  const Vec f = x - n;
  Vec p = splat(5.517165e-2f);  // least relative error on [-1/2, 1/2]
  p = p * f + 2.4261112e-1f;
  p = p * f + 6.9326099e-1f;
  p = p * f + 9.9992807e-1f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  IVec bits, result;
  std::memcpy(&bits, &shifted, sizeof(bits));
  std::memcpy(&result, &p, sizeof(result));
  result += bits << 23;  // the integer sits in the low mantissa bits
  return as_floats((UVec)result);
#endif
}

// Natural logarithm of normal numbers above 0; relative error below 3e-7.
inline Vec log(Vec x) {
  UVec bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // A mantissa from sqrt(1/2) to sqrt(2), of which the logarithm is smallest.
  bits += 0x3f800000u - 0x3f3504f3u;
  const Vec exponent = __builtin_convertvector((IVec)(bits >> 23) - 127, Vec);
  const Vec f = as_floats((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  Vec p = splat(7.0376836292e-2f);  // Cephes' logf polynomial
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec z = f * f;
  const Vec y = f * z * p + exponent * -2.12194440e-4f - z * 0.5f;
  return f + y + exponent * 0.693359375f;
}

// x[i] = ln x[i] for probabilities, and 0 for those of 1 and above. Reads and writes whole vectors.
inline void log_probabilities(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec p = load(x + i);
    const Vec least = splat(std::numeric_limits<float>::min());
    store(x + i, select(p < 1.0f, log(max(p, least)), Vec{}));
  }
}

// The largest lanes of four vectors.
inline Quad fold_max(Vec v) {
  Quad part[kLanes / 4];
  std::memcpy(part, &v, sizeof(v));
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
  }
  return part[0];
}
inline Quad maxima(Vec a, Vec b, Vec c, Vec d) {
  const auto of = [](Quad x, Quad y) { return x > y ? x : y; };
  const Quad w = fold_max(a), x = fold_max(b), y = fold_max(c), z = fold_max(d);
  const Quad wx = of(__builtin_shufflevector(w, x, 0, 4, 2, 6),
                     __builtin_shufflevector(w, x, 1, 5, 3, 7));
  const Quad yz = of(__builtin_shufflevector(y, z, 0, 4, 2, 6),
                     __builtin_shufflevector(y, z, 1, 5, 3, 7));
  return of(__builtin_shufflevector(wx, yz, 0, 1, 4, 5),
            __builtin_shufflevector(wx, yz, 2, 3, 6, 7));
}

}  // namespace
}  // namespace vllm_sparse
