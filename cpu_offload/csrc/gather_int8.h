// int8 rows on the instructions that multiply bytes (AVX512_VNNI).
//
// A query becomes 16-bit integers, in two bytes, of which the upper one is signed: its error is
// 2^-16 of its largest number, below that of a bfloat16 query. Products of bytes and their sums
// are exact: 256 dimensions of 255 * 128 stay below 2^23.
#pragma once

#include "gather_bf16.h"

namespace vllm_sparse {
namespace {

struct SplitInt8 {
  using T = Int8;
  const int64_t head_size, padded;
  const int group;
  int8_t* high;  // [G, padded]; q = factor * (256 * high + low)
  int8_t* low;   // [G, padded]
  float* factor;  // [G]
  // [G] 128 * the sums of high and of low: keys are read as unsigned numbers, 128 too large.
  float* high_offset;
  float* low_offset;

  static int64_t stride(int64_t head_size) { return head_size; }
  static int64_t pad(int64_t head_size) { return (head_size + 63) / 64 * 64; }
  static size_t floats(const Gather& a) { return a.group * (pad(a.head_size) / 2 + 3); }

  SplitInt8(const Gather& a, const GatherItem& item, float* scratch)
      : head_size(a.head_size),
        padded(pad(a.head_size)),
        group(static_cast<int>(a.group)),
        high(reinterpret_cast<int8_t*>(scratch)),
        low(high + group * padded),
        factor(reinterpret_cast<float*>(low + group * padded)),
        high_offset(factor + group),
        low_offset(high_offset + group) {
    std::memset(high, 0, 2 * group * padded);
    for (int g = 0; g < group; ++g) {
      const float* q = item.q + g * head_size;
      float largest = 0.0f;
      for (int64_t d = 0; d < head_size; ++d) largest = std::fmax(largest, std::fabs(q[d]));
      factor[g] = largest > 0.0f ? largest / 32512.0f : 1.0f;
      int upper_sum = 0, lower_sum = 0;
      for (int64_t d = 0; d < head_size; ++d) {
        const int whole = static_cast<int>(std::lrint(q[d] / factor[g]));
        const int upper = (whole + 128) >> 8, lower = whole - 256 * upper;
        high[g * padded + d] = static_cast<int8_t>(upper);
        low[g * padded + d] = static_cast<int8_t>(lower);
        upper_sum += upper;
        lower_sum += lower;
      }
      high_offset[g] = 128.0f * static_cast<float>(upper_sum);
      low_offset[g] = 128.0f * static_cast<float>(lower_sum);
    }
  }

  template <int kHeads>
  void score_heads(const Chunk<T>& now, Feed& feed, int g0, float* scores) const {
    constexpr int kRows = 8 / kHeads;
    const int lines = g0 == 0 ? kRows * static_cast<int>((head_size + 31) / 32) : 0;
    for (int n = 0; n < now.count; n += kRows) {
      feed.far(lines);
      feed.near(lines);
      __m512i acc[16] = {};  // of the upper bytes, of the lower bytes
      for (int64_t d = 0; d < head_size; d += 64) {
        const __mmask64 mask = head_size - d >= 64 ? ~0ull : (1ull << (head_size - d)) - 1;
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const __m512i x = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, now.keys[n + i] + d),
                                             _mm512_set1_epi8(-128));
#pragma GCC unroll 4
          for (int g = 0; g < kHeads; ++g) {
            const int8_t* upper = high + (g0 + g) * padded + d;
            const int8_t* lower = low + (g0 + g) * padded + d;
            __m512i* sum = acc + g * kRows + i;
            sum[0] = _mm512_dpbusd_epi32(sum[0], x, _mm512_loadu_si512(upper));
            sum[8] = _mm512_dpbusd_epi32(sum[8], x, _mm512_loadu_si512(lower));
          }
        }
      }
      Vec floats[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) floats[i] = (Vec)_mm512_cvtepi32_ps(acc[i]);
      float sum[16];
      store(sum, sums_of_16(floats));
      for (int g = 0; g < kHeads; ++g) {
        for (int i = 0; i < kRows; ++i) {
          const float upper = sum[g * kRows + i] - high_offset[g0 + g];
          const float lower = sum[8 + g * kRows + i] - low_offset[g0 + g];
          scores[(g0 + g) * kBlock + n + i] = (256.0f * upper + lower) * factor[g0 + g];
        }
      }
    }
  }

  void score(const Chunk<T>& now, Feed& feed, float* scores) const {
    for_heads(group, [&](int g, auto heads) { score_heads<heads>(now, feed, g, scores); });
  }

  void accumulate(const Chunk<T>& now, Feed&, const float* weights, float* out) const {
    for_heads(group, [&](int g, auto heads) {
      decode_accumulate<heads>(weights + g * kBlock, now.values, now.count, head_size,
                               out + g * head_size, [](int, int64_t, int) {});
    });
  }

  static int64_t place(int64_t d) { return d; }
};

}  // namespace
}  // namespace vllm_sparse
