// What samplers know of keys without reading them: four bits of each number, less the page's mean.
//
// A page of one KV head has its centre fp32 [D], a step for each row fp32 [rows], the numbers
// 1 .. 15 (8 is the centre) [rows / 16][D / 8][16 rows][4 bytes], of which the low halves are four
// dimensions and the high halves the next four, and hash codes uint8 [tables][rows] where there
// are any. Sixteen rows are multiplied with a query at once, with no sums across lanes: 0.13 bytes
// are read for each of bfloat16 keys and values, 0.07 for each of float32.
#pragma once

#include <cmath>
#include <cstring>

#include "byte_products.h"
#include "host.h"
#include "vec.h"

namespace vllm_sparse {
namespace {

constexpr int kSketchRows = 16;
constexpr float kMiddle = 8.0f, kLargest = 7.0f;

struct Sketch {
  float* centre;
  float* steps;
  uint8_t* numbers;
  uint8_t* codes;

  // `segment`: bytes from a layer's first page to this one.
  Sketch(const Host& h, int64_t layer, int64_t segment, int64_t kv_head) {
    char* at = h.parts + layer * h.layer_bytes + segment + h.index_at + kv_head * h.index_bytes;
    centre = reinterpret_cast<float*>(at);
    steps = centre + h.head_size;
    numbers = reinterpret_cast<uint8_t*>(steps + (int64_t{1} << h.shift));
    codes = numbers + (h.head_size << h.shift) / 2;
  }
};

// Of a page of one KV head, its hash codes not included.
inline int64_t sketch_bytes(const Host& h) {
  return h.head_size * sizeof(float) + ((sizeof(float) + h.head_size / 2) << h.shift);
}

// The largest magnitude; infinity where a number is not finite.
inline float largest(const float* x, int64_t n) {
  float most = 0.0f, bad = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    bad += x[i] * 0.0f;
  }
  return bad == 0.0f ? most : kInf;
}

// Enters one key, less its centre: x [D].
inline void sketch_enter(const Sketch& s, int64_t row, const float* x, int64_t head_size) {
  float most = largest(x, head_size);
  if (!(most < kInf)) most = 0.0f;  // not finite: nothing is said of such a row
  const float inverse = most > 1e-30f ? kLargest / most : 0.0f;
  s.steps[row] = most / kLargest;
  uint8_t* to = s.numbers + row / kSketchRows * (kSketchRows * head_size / 2) +
                row % kSketchRows * 4;
  for (int64_t d = 0; d < head_size; d += 8, to += kSketchRows * 4) {
    for (int i = 0; i < 4; ++i) {
      const float low = inverse > 0.0f ? x[d + i] * inverse : 0.0f;
      const float high = inverse > 0.0f ? x[d + 4 + i] * inverse : 0.0f;
      to[i] = static_cast<uint8_t>(static_cast<int>(low + kMiddle + 0.5f) |
                                   static_cast<int>(high + kMiddle + 0.5f) << 4);
    }
  }
}

// The queries of a group in eight bits, and what their products are to be multiplied with.
struct SketchQuery {
  int8_t* q;       // [G, D]
  float* factor;   // [G]
  int32_t* shift;  // [G] kMiddle times the sum of q
};

// False where a number is not finite.
inline bool sketch_query(const float* q, int64_t group, int64_t head_size, float scale,
                         const SketchQuery& s) {
  for (int64_t g = 0; g < group; ++g) {
    const float* x = q + g * head_size;
    const float most = largest(x, head_size);
    if (!(most < kInf)) return false;
    // A subnormal maximum has no finite inverse.
    const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
    int32_t sum = 0;
    for (int64_t d = 0; d < head_size; ++d) {
      const int n = static_cast<int>(std::lrint(x[d] * inverse));
      s.q[g * head_size + d] = static_cast<int8_t>(n);
      sum += n;
    }
    s.factor[g] = most / 127.0f * scale;
    s.shift[g] = sum * static_cast<int32_t>(kMiddle);
    // No product with a sketch overflows: 127 times 15 for each dimension.
    if (!(s.factor[g] * static_cast<float>(127 * 15 * head_size) < kInf)) return false;
  }
  return true;
}

// Products of kGroup heads with 16 rows, lane by lane.
typedef IVec SketchProducts[kSketchRows / kLanes];
typedef int32_t FourBytes __attribute__((may_alias));

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
typedef int16_t Shorts __attribute__((vector_size(sizeof(IVec)), may_alias));

// Sums of the products of pairs of bytes, x not signed, y signed; and of pairs of shorts.
inline Shorts multiply_bytes(IVec x, int32_t four) {
#if defined(__AVX512BW__)
  return (Shorts)_mm512_maddubs_epi16((__m512i)x, _mm512_set1_epi32(four));
#else
  return (Shorts)_mm256_maddubs_epi16((__m256i)x, _mm256_set1_epi32(four));
#endif
}
inline IVec sum_pairs(Shorts x) {
#if defined(__AVX512BW__)
  return (IVec)_mm512_madd_epi16((__m512i)x, _mm512_set1_epi16(1));
#else
  return (IVec)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1));
#endif
}
#endif

template <int kGroup>
inline void sketch_products(const uint8_t* numbers, const int8_t* q, int64_t head_size,
                            SketchProducts* products) {
#if defined(__AVX512VNNI__)
  IVec low_sum[kGroup] = {}, high_sum[kGroup] = {};  // the upper halves count sixteenfold
  const __m512i lower = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(static_cast<char>(0xf0));
  for (int64_t d = 0; d < head_size; d += 8, numbers += 64) {
    const __m512i x = _mm512_loadu_si512(numbers);
    const __m512i low = _mm512_and_si512(x, lower), high = _mm512_and_si512(x, upper);
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
      // Read as four bytes each, not eight at once: from memory they are broadcast for nothing.
      const FourBytes* four = reinterpret_cast<const FourBytes*>(q + g * head_size + d);
      low_sum[g] = add_byte_products(low_sum[g], low, _mm512_set1_epi32(four[0]));
      high_sum[g] = add_byte_products(high_sum[g], high, _mm512_set1_epi32(four[1]));
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroup; ++g) {
    products[g][0] = low_sum[g] + (high_sum[g] >> 4);
  }
#elif defined(__AVX2__)
  constexpr int64_t kBrief = 32;  // dimensions whose sums fit 16 bits: 8 times 2 x 15 x 127
  for (int v = 0; v < kSketchRows / kLanes; ++v) {
    const uint8_t* from = numbers + v * sizeof(IVec);
    IVec all[kGroup] = {};
    for (int64_t first = 0; first < head_size; first += kBrief) {
      const int64_t end = head_size - first < kBrief ? head_size : first + kBrief;
      Shorts brief[kGroup] = {};
      for (int64_t d = first; d < end; d += 8, from += 64) {
        IVec x;
        std::memcpy(&x, from, sizeof(x));
        const IVec low = x & 0x0f0f0f0f, high = x >> 4 & 0x0f0f0f0f;
#pragma GCC unroll 4
        for (int g = 0; g < kGroup; ++g) {
          const FourBytes* four = reinterpret_cast<const FourBytes*>(q + g * head_size + d);
          brief[g] += multiply_bytes(low, four[0]) + multiply_bytes(high, four[1]);
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) all[g] += sum_pairs(brief[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) products[g][v] = all[g];
  }
#else
  int32_t sums[kGroup][kSketchRows] = {};
  for (int64_t d = 0; d < head_size; d += 8, numbers += 64) {
    for (int g = 0; g < kGroup; ++g) {
      const int8_t* y = q + g * head_size + d;
      for (int r = 0; r < kSketchRows; ++r) {
        int32_t sum = 0;
        for (int i = 0; i < 4; ++i) {
          const uint8_t x = numbers[r * 4 + i];
          sum += (x & 15) * y[i] + (x >> 4) * y[4 + i];
        }
        sums[g][r] += sum;
      }
    }
  }
  std::memcpy(products, sums, sizeof(sums));
#endif
}

}  // namespace
}  // namespace vllm_sparse
