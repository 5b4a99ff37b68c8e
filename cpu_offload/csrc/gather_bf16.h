// bfloat16 rows on the instructions that multiply pairs of them (AVX512_BF16): products are exact,
// sums fp32. The weights of the values are rounded to bfloat16, as in other flash kernels.
#pragma once

#include "gather_split.h"
#include "pairs.h"

namespace vllm_sparse {
namespace {

// Heads are taken four, two or one at a time. Values are interleaved by pairs of rows, as the
// products want them, before they are summed. Where rows follow each other that is done while the
// keys are read, so that memory is read from one end to the other: 1.2 times as fast as keys now
// and values later. Single rows are better read in two runs: a core that sees a whole row go by
// fetches what lies behind it as well, and at a density of 1/4 that made it 1.3 times as slow.
struct PairedBFloat16 {
  using T = BFloat16;
  const int64_t head_size, stride_;
  const int group;
  BFloat16* pairs;  // [32, 2 * stride] values of rows 2n and 2n + 1, 16 of each in turn
  BFloat16* q;      // [G, stride]
  Pair* weights;    // [G, 32] weights of rows 2n and 2n + 1

  static int64_t stride(int64_t head_size) { return (head_size + 31) / 32 * 32; }
  static size_t floats(const Gather& a) {
    return kBlock / 2 * stride(a.head_size) + a.group * (stride(a.head_size) / 2 + kBlock / 2);
  }

  PairedBFloat16(const Gather& a, const GatherItem& item, float* scratch)
      : head_size(a.head_size),
        stride_(stride(a.head_size)),
        group(static_cast<int>(a.group)),
        pairs(reinterpret_cast<BFloat16*>(scratch)),
        q(pairs + kBlock * stride_),
        weights(reinterpret_cast<Pair*>(q + group * stride_)) {
    for (int g = 0; g < group; ++g) {
      for (int64_t d = 0; d < stride_; ++d) {
        from_float(d < head_size ? item.q[g * head_size + d] : 0.0f, q + g * stride_ + d);
      }
    }
  }

  // Interleaves the values of rows n and n + 1, and fetches as it goes if `feed` is given.
  void take_values(const Chunk<T>& now, Feed* feed, int n) const {
    BFloat16* to = pairs + n * stride_;
    for (int64_t d = 0; d < head_size; d += 32, to += 64) {
      const __m512i x = (__m512i)load_pairs(now.values[n], d, head_size);
      const __m512i y = (__m512i)load_pairs(now.values[n + 1], d, head_size);
      _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
      _mm512_store_si512(to + 32, _mm512_unpackhi_epi16(x, y));
      if (feed != nullptr) feed->far_two(), feed->near_two();
    }
  }

  template <int kHeads>
  void score_heads(const Chunk<T>& now, Feed& feed, int g0, float* scores) const {
    constexpr int kRows = 16 / kHeads;
    const bool take = g0 == 0 && !now.scattered;
    // Every row is to be fetched once and once again. Where values are taken along, that and
    // summing them up fetch the others of its lines.
    const int fetches = g0 > 0 ? 0 : now.scattered ? kRows / 2 : kRows / 4;
    for (int n = 0; n < now.count; n += kRows) {
      for (int i = n; take && i < n + kRows; i += 2) take_values(now, &feed, i);
      Vec acc[16] = {};
      for (int64_t d = 0; d < head_size; d += 32) {
        for (int i = 0; i < fetches; ++i) feed.far_two(), feed.near_two(), feed.near_two();
        Vec y[kHeads];
#pragma GCC unroll 4
        for (int g = 0; g < kHeads; ++g) y[g] = load_pairs(q + (g0 + g) * stride_, d, stride_);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const Vec x = load_pairs(now.keys[n + i], d, head_size);
#pragma GCC unroll 4
          for (int g = 0; g < kHeads; ++g) {
            acc[g * kRows + i] = add_pair_products(acc[g * kRows + i], x, y[g]);
          }
        }
      }
      const Vec all = sums_of_16(acc);
      for (int g = 0; g < kHeads; ++g) {
        std::memcpy(scores + (g0 + g) * kBlock + n,
                    reinterpret_cast<const float*>(&all) + g * kRows, kRows * sizeof(float));
      }
    }
  }

  void score(const Chunk<T>& now, Feed& feed, float* scores) const {
    for_heads(group, [&](int g, auto heads) { score_heads<heads>(now, feed, g, scores); });
    // In fours, as they are summed.
    for (int n = 0; now.scattered && n < (now.count + 3) / 4 * 4; n += 2) {
      take_values(now, nullptr, n);
    }
  }

  template <int kHeads>
  void accumulate_heads(const Chunk<T>& now, Feed& feed, int g0, float* out) const {
    const int fetches = g0 > 0 ? 0 : now.scattered ? 2 : 1;
    for (int64_t d = 0; d < stride_; d += 32) {
      Vec acc[kHeads][2];
#pragma GCC unroll 4
      for (int g = 0; g < kHeads; ++g) {
        acc[g][0] = load(out + (g0 + g) * stride_ + d);
        acc[g][1] = load(out + (g0 + g) * stride_ + d + 16);
      }
      for (int n = 0; n < now.count; n += 4) {
        for (int i = 0; i < fetches; ++i) feed.far_two();
#pragma GCC unroll 2
        for (int i = n; i < n + 4; i += 2) {
          const BFloat16* from = pairs + i * stride_ + 2 * d;
          const Vec first = (Vec)_mm512_load_si512(from);
          const Vec second = (Vec)_mm512_load_si512(from + 32);
#pragma GCC unroll 4
          for (int g = 0; g < kHeads; ++g) {
            const Pair p = weights[(g0 + g) * kBlock / 2 + i / 2];
            acc[g][0] = add_product(acc[g][0], first, p);
            acc[g][1] = add_product(acc[g][1], second, p);
          }
        }
      }
#pragma GCC unroll 4
      for (int g = 0; g < kHeads; ++g) {
        store(out + (g0 + g) * stride_ + d, acc[g][0]);
        store(out + (g0 + g) * stride_ + d + 16, acc[g][1]);
      }
    }
  }

  void accumulate(const Chunk<T>& now, Feed& feed, const float* p, float* out) const {
    for (int i = 0; i < group * kBlock; i += 32) {
      store_pairs(weights + i / 2, load(p + i), load(p + i + kLanes));
    }
    for_heads(group, [&](int g, auto heads) { accumulate_heads<heads>(now, feed, g, out); });
  }

  // Interleaving two rows leaves dimensions 0-3, 8-11, 16-19, 24-27 in the first of two vectors.
  static int64_t place(int64_t d) {
    const int64_t in = d % 32;
    return d - in + (in / 4 % 2) * 16 + in / 8 * 4 + in % 4;
  }
};

}  // namespace
}  // namespace vllm_sparse
