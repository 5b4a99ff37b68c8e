// A vector of kLanes floats, its exp, and the storage types it converts from and to.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// Whether any lane of a mask is set.
inline bool any(IVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  uint64_t parts[kLanes / 2], all = 0;
  std::memcpy(parts, &mask, sizeof(mask));
  for (int i = 0; i < kLanes / 2; ++i) all |= parts[i];
  return all != 0;
#endif
}

// table[index] in each lane.
inline Vec gather(const float* table, IVec index) {
#if defined(__AVX512F__)
  return (Vec)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (Vec)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[index[i]];
  return v;
#endif
}

// a0 b0 a1 b1 ... of the lower, and of the upper halves.
#if VLLM_SPARSE_LANES == 16
inline Vec interleave_low(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline Vec interleave_high(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
#elif VLLM_SPARSE_LANES == 8
inline Vec interleave_low(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline Vec interleave_high(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
inline Vec interleave_low(Vec a, Vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Vec interleave_high(Vec a, Vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// exp for x <= 0 (and a little above), 0 below -87.3 and for -inf; relative error below 2e-7.
inline Vec exp(Vec x) {
  const Vec lowest = splat(-87.3f);
#if !defined(__AVX512F__)
  const IVec vanishes = x < lowest;
  x = select(vanishes, lowest, x);
#endif
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
#if defined(__AVX512F__)
  const __mmask16 stays = _mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(stays, (__m512)p, (__m512)n);
#else
  IVec bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;  // the integer sits in the low mantissa bits
  IVec result;
  std::memcpy(&result, &p, sizeof(result));
  result += bits;
  Vec y;
  std::memcpy(&y, &result, sizeof(y));
  return select(vanishes, Vec{}, y);
#endif
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

// kLanes stored numbers as fp32, whatever their alignment. GCC 12 makes four instructions of the
// conversion that is one on x86, and decode in bf16 half as fast with it.
inline UVec load_bits(const void* p) {
#if defined(__AVX512F__)
  return (UVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (UVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  HalfVec bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, UVec);
#endif
}
inline Vec as_floats(UVec bits) {
  Vec v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}
inline Vec load_row(const float* p) { return load(p); }
inline Vec load_row(const BFloat16* p) { return as_floats(load_bits(p) << 16); }
inline Vec load_row(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const UVec bits = load_bits(p);
  const UVec magnitude = (bits & 0x7fff) << 13;
  UVec y;
  const Vec scaled = as_floats(magnitude) * 0x1p112f;
  std::memcpy(&y, &scaled, sizeof(y));
  const UVec special = magnitude | 0x7f800000;
  const UVec is_special = (bits & 0x7c00) == 0x7c00;
  y = (y & ~is_special) | (special & is_special);
  return as_floats(y | (bits & 0x8000) << 16);
#endif
}

// kLanes fp32 numbers to storage.
template <class T>
inline void store_row(T* to, Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) from_float(lanes[i], to + i);
}
inline void store_row(float* to, Vec v) { store(to, v); }
// As from_float, without its branch.
inline void store_row(BFloat16* to, Vec v) {
  UVec bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const UVec is_nan = (UVec)(v != v), rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const UVec kept = (((bits | 0x400000) & is_nan) | (rounded & ~is_nan)) >> 16;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)kept));
#elif defined(__AVX2__)
  const __m256i x = (__m256i)kept;
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
#else
  const HalfVec halves = __builtin_convertvector(kept, HalfVec);
  std::memcpy(to, &halves, sizeof(halves));
#endif
}
#if defined(__AVX512F__)
inline void store_row(Float16* to, Vec v) {
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}
#endif

// Transposes kLanes x kLanes numbers: each step interleaves row i with row i + kLanes / 2.
inline void transpose(Vec r[kLanes]) {
  Vec t[kLanes];
  for (int step = 1; step < kLanes; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      t[2 * i] = interleave_low(r[i], r[i + kLanes / 2]);
      t[2 * i + 1] = interleave_high(r[i], r[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) r[i] = t[i];
  }
}

template <class T>
inline void convert_row(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load_row(from + i));
}

}  // namespace
}  // namespace vllm_sparse
