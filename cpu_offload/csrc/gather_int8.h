// int8 rows on the instructions that multiply bytes (AVX512_VNNI), which take an unsigned one and a
// signed one. Their products and sums are exact.
//
// A query becomes 16-bit integers, in two bytes, of which the upper one is signed: its error is
// 2^-16 of its largest number, below that of a bfloat16 query. Keys are made unsigned by adding 128.
// The weights of 64 values, none negative, become 24-bit integers, in three bytes: two would lose a
// tail of 63 rows beside one that weighs 10^5 times as much, 5e-4 of the mass.
#pragma once

#include <cfloat>

#include "byte_products.h"
#include "gather_bf16.h"

namespace vllm_sparse {
namespace {

struct SplitInt8 {
  using T = Int8;
  static constexpr int kPlanes = 3;             // bytes of a weight
  static constexpr float kWhole = 16776960.0f;  // the largest weight: rounded, below 2^24
  static constexpr float kLeast = 0x1p-100f;    // below it kWhole / weight may be no float

  const int64_t head_size, padded;
  const int group;
  int8_t* high;         // [G, padded]; q = factor * (256 * high + low)
  int8_t* low;          // [G, padded]
  int32_t* high_start;  // [G, 16] -128 * the sums of high of a lane, and of low
  int32_t* low_start;
  int8_t* values;    // [16, padded / 16, 16, 4] of four rows, interleaved
  int32_t* weights;  // [G, kPlanes, 16] of four rows
  float* factor;     // [G]
  float* unit;       // [G] what a weight of 1 stands for; 0 where they count for nothing

  static int64_t stride(int64_t head_size) { return (head_size + 63) / 64 * 64; }
  static size_t floats(const Gather& a) {
    const int64_t queries = a.group * stride(a.head_size) / 2;
    return queries + kBlock * stride(a.head_size) / 4 + a.group * (2 + kPlanes) * 16 + 2 * a.group;
  }

  SplitInt8(const Gather& a, const GatherItem& item, float* scratch)
      : head_size(a.head_size),
        padded(stride(a.head_size)),
        group(static_cast<int>(a.group)),
        high(reinterpret_cast<int8_t*>(scratch)),
        low(high + group * padded),
        high_start(reinterpret_cast<int32_t*>(low + group * padded)),
        low_start(high_start + group * 16),
        values(reinterpret_cast<int8_t*>(low_start + group * 16)),
        weights(reinterpret_cast<int32_t*>(values + kBlock * padded)),
        factor(reinterpret_cast<float*>(weights + group * kPlanes * 16)),
        unit(factor + group) {
    std::memset(high, 0, 2 * group * padded);
    for (int g = 0; g < group; ++g) {
      const float* q = item.q + g * head_size;
      float largest = 0.0f;
      for (int64_t d = 0; d < head_size; ++d) largest = std::fmax(largest, std::fabs(q[d]));
      factor[g] = largest > 0.0f ? largest / 32512.0f : 1.0f;
      for (int64_t d = 0; d < head_size; ++d) {
        const int whole = static_cast<int>(std::lrint(q[d] / factor[g]));
        const int upper = (whole + 128) >> 8, lower = whole - 256 * upper;
        high[g * padded + d] = static_cast<int8_t>(upper);
        low[g * padded + d] = static_cast<int8_t>(lower);
      }
      start(high + g * padded, high_start + g * 16);
      start(low + g * padded, low_start + g * 16);
    }
  }

  void start(const int8_t* q, int32_t* to) const {
    IVec sum = {};
    for (int64_t d = 0; d < padded; d += 64) {
      sum = add_byte_products(sum, _mm512_set1_epi8(-128), _mm512_load_si512(q + d));
    }
    _mm512_store_si512(to, (__m512i)-sum);
  }

  __m512i load_bytes(const Int8* row, int64_t d) const {
    const __mmask64 mask = head_size - d >= 64 ? ~0ull : (1ull << (head_size - d)) - 1;
    return _mm512_maskz_loadu_epi8(mask, row + d);
  }

  // Scores, not scaled, of kHeads heads and 8 / kHeads keys from n on: sums[g * 16 / kHeads + i].
  template <int kHeads>
  void eight_scores(const Chunk<T>& now, int g0, int n, Vec* sums) const {
    constexpr int kRows = 8 / kHeads;
    IVec upper[8], lower[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      upper[j] = (IVec)_mm512_load_si512(high_start + (g0 + j / kRows) * 16);
      lower[j] = (IVec)_mm512_load_si512(low_start + (g0 + j / kRows) * 16);
    }
    for (int64_t d = 0; d < head_size; d += 64) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512i x =
            _mm512_xor_si512(load_bytes(now.keys[n + i], d), _mm512_set1_epi8(-128));
#pragma GCC unroll 4
        for (int g = 0; g < kHeads; ++g) {
          const int8_t* y = high + (g0 + g) * padded + d;
          const int8_t* z = low + (g0 + g) * padded + d;
          const int j = g * kRows + i;
          upper[j] = add_byte_products(upper[j], x, _mm512_load_si512(y));
          lower[j] = add_byte_products(lower[j], x, _mm512_load_si512(z));
        }
      }
    }
    // A lane sums 16 dimensions at most: 2^8 times 16 * 128 * 127 is below 2^27.
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const IVec both = (upper[j] << 8) + lower[j];
      sums[j / kRows * 2 * kRows + j % kRows] = __builtin_convertvector(both, Vec);
    }
  }

  template <int kHeads>
  void score_heads(const Chunk<T>& now, Feed& feed, int g0, float* scores) const {
    constexpr int kRows = 16 / kHeads;
    const bool first = g0 == 0, take = first && !now.scattered;
    const int fetches = first ? kRows * static_cast<int>((head_size + 63) / 64) : 0;
    for (int n = 0; n < now.count; n += kRows) {
      for (int i = 0; i < fetches; ++i) feed.far_two(), feed.near_two();
      for (int i = n; take && i < n + kRows; i += 4) take_values(now, i);
      Vec each[16];
      eight_scores<kHeads>(now, g0, n, each);
      eight_scores<kHeads>(now, g0, n + kRows / 2, each + kRows / 2);
      const Vec all = sums_of_16(each);
      for (int g = 0; g < kHeads; ++g) {
        std::memcpy(scores + (g0 + g) * kBlock + n,
                    reinterpret_cast<const float*>(&all) + g * kRows, kRows * sizeof(float));
      }
    }
  }

  void score(const Chunk<T>& now, Feed& feed, float* scores) const {
    for_heads(group, [&](int g, auto heads) { score_heads<heads>(now, feed, g, scores); });
    for (int g = 0; g < group; ++g) {
      float* s = scores + g * kBlock;
      for (int n = 0; n < kBlock; n += kLanes) store(s + n, load(s + n) * factor[g]);
    }
    for (int n = 0; now.scattered && n < now.count; n += 4) take_values(now, n);
  }

  // Interleaves the values of rows n to n + 3.
  void take_values(const Chunk<T>& now, int n) const {
    int8_t* to = values + n * padded;
    for (int64_t d = 0; d < head_size; d += 64, to += 256) {
      const __m512i a = load_bytes(now.values[n], d), b = load_bytes(now.values[n + 1], d);
      const __m512i c = load_bytes(now.values[n + 2], d), e = load_bytes(now.values[n + 3], d);
      const __m512i ab = _mm512_unpacklo_epi8(a, b), ce = _mm512_unpacklo_epi8(c, e);
      const __m512i ab2 = _mm512_unpackhi_epi8(a, b), ce2 = _mm512_unpackhi_epi8(c, e);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(ab, ce));
      _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(ab, ce));
      _mm512_store_si512(to + 128, _mm512_unpacklo_epi16(ab2, ce2));
      _mm512_store_si512(to + 192, _mm512_unpackhi_epi16(ab2, ce2));
    }
  }

  // Where that leaves dimension d: each of four vectors has four dimensions of every sixteen.
  static int64_t place(int64_t d) {
    const int64_t in = d % 64;
    return d - in + in % 16 / 4 * 16 + in / 16 * 4 + in % 4;
  }

  // Weights p [64] of a head as integers. False where they can't be.
  bool take_weights(const float* p, int g) const {
    Vec largest = load(p), sum = largest;
    for (int n = kLanes; n < kBlock; n += kLanes) {
      const Vec x = load(p + n);
      largest = largest > x ? largest : x;
      sum += x;
    }
    const float most = horizontal_max(largest), all = horizontal_sum(sum);
    const bool none = all == 0.0f;
    if (!none && !(most >= kLeast && all <= FLT_MAX)) return false;
    unit[g] = none ? 0.0f : most / kWhole;
    const float inverse = none ? 0.0f : kWhole / most;
    for (int n = 0; n < kBlock; n += kLanes) {
      const __m512i whole = _mm512_cvtps_epi32((__m512)(load(p + n) * inverse));
      for (int plane = 0; plane < kPlanes; ++plane) {
        const __m512i byte = _mm512_srli_epi32(whole, 8 * (kPlanes - 1 - plane));
        int32_t* to = weights + (g * kPlanes + plane) * 16 + n / 4;
        _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(byte));
      }
    }
    return true;
  }

  template <int kHeads>
  void accumulate_heads(int count, int g0, float* out) const {
    constexpr int kSteps = 4 / kHeads;  // twelve sums at a time do not wait for each other
    for (int64_t d = 0; d < padded; d += 16 * kSteps) {
      IVec acc[kHeads][kSteps][kPlanes] = {};
      const int8_t* from = values + 4 * d;
      const int32_t* w = weights + g0 * kPlanes * 16;
      for (int n = 0; n < count; n += 4, from += 4 * padded, ++w) {
#pragma GCC unroll 4
        for (int j = 0; j < kSteps; ++j) {
          const __m512i x = _mm512_load_si512(from + 64 * j);
#pragma GCC unroll 4
          for (int g = 0; g < kHeads; ++g) {
#pragma GCC unroll 3
            for (int plane = 0; plane < kPlanes; ++plane) {
              const __m512i y = _mm512_set1_epi32(w[(g * kPlanes + plane) * 16]);
              acc[g][j][plane] = add_byte_products(acc[g][j][plane], y, x);
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kHeads; ++g) {
#pragma GCC unroll 4
        for (int j = 0; j < kSteps; ++j) {
          const IVec* of = acc[g][j];
          // 64 * 255 * 128 is below 2^21.
          const Vec upper = __builtin_convertvector(of[0], Vec);
          const Vec sum = upper * 65536.0f + __builtin_convertvector((of[1] << 8) + of[2], Vec);
          float* to = out + (g0 + g) * padded + d + 16 * j;
          store(to, load(to) + sum * unit[g0 + g]);
        }
      }
    }
  }

  void accumulate(const Chunk<T>& now, Feed&, const float* p, float* out) const {
    for (int g = 0; g < group; ++g) {
      if (take_weights(p + g * kBlock, g)) continue;
      unit[g] = 0.0f;
      for (int n = 0; n < now.count; ++n) {
        for (int64_t d = 0; d < head_size; ++d) {
          out[g * padded + place(d)] += p[g * kBlock + n] * now.values[n][d].value;
        }
      }
    }
    for_heads(group, [&](int g, auto heads) { accumulate_heads<heads>(now.count, g, out); });
  }
};

}  // namespace
}  // namespace vllm_sparse
