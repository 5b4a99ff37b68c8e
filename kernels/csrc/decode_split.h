// Decode: the query heads of one KV head over a range of one sequence's keys, or of keys that some
// sequences share, and the merge of such ranges. Lanes lie along the head size; each key and value
// is read from memory once for all the heads, and once for all that share it.
#pragma once

#include <cmath>
#include <vector>

#include "decode_products.h"
#include "decode_softmax.h"
#include "rows.h"

namespace vllm_sparse {
namespace {

// Up to 64 neighbouring keys of a sequence. Behind the last key it is repeated, as scores are made
// of whole steps; sums of values end with the last.
template <class T>
struct BlockRows {
  const T* keys[kBlock];
  const T* values[kBlock];
  int count = 0;

  void find(const Rows<T>& rows, int64_t first, int64_t last) {
    count = static_cast<int>(last - first < kBlock ? (last > first ? last - first : 0) : kBlock);
    int64_t positions[kBlock];
    for (int n = 0; n < count; ++n) positions[n] = first + n;
    rows.find(positions, count, keys, values);
    for (int n = count; n < kBlock && count > 0; ++n) keys[n] = keys[count - 1];
  }

  // Keys n .. n + 3 into the second-level cache, and `dims` numbers of a value: the next block is
  // fetched while one is worked on, its keys beside scores and its values beside sums. From memory
  // at 32K keys decode takes half of the time that it takes without, and all of it beside the
  // scores was 1.3 times as slow in fp32. That the first level has them too gains nothing.
  void fetch_keys(int n, int64_t head_size) const {
    const int end = n + 4 < count ? n + 4 : count;
    for (; n < end; ++n) fetch_lines(keys[n], head_size * sizeof(T));
  }
  void fetch_value(int n, int64_t d, int dims) const {
    if (n < count) fetch_lines(values[n] + d, dims * sizeof(T));
  }
};

// What a split works with for one sequence, in the scratch of one thread.
struct SplitScratch {
  float* q;            // [G, D] of DecodeOperands::Query
  float* scores;       // [G, 64]
  float* base;         // [G] probabilities are exp(score - base)
  float* sum;          // [G]
  float* top;          // [G] highest score
  UnifiedSums* lanes;  // [G]

  static size_t floats(const Shape& shape) {
    const int64_t group = shape.num_heads / shape.num_kv_heads;
    return group * (shape.head_size + kBlock + 3 + sizeof(UnifiedSums) / sizeof(float));
  }
  SplitScratch(float* memory, int64_t group, int64_t head_size)
      : q(memory),
        scores(q + group * head_size),
        base(scores + group * kBlock),
        sum(base + group),
        top(sum + group),
        lanes(reinterpret_cast<UnifiedSums*>(top + group)) {}

  void begin(const float* phi, int group, int64_t head_size, float* out) const {
    for (int g = 0; g < group; ++g) {
      base[g] = phi != nullptr ? phi[g] : -kInf;
      sum[g] = 0.0f;
      if (phi != nullptr) lanes[g].clear();
    }
    std::memset(out, 0, group * head_size * sizeof(float));
  }
  // Whether no score so far is too high for phi.
  bool below(const float* phi, int group) const {
    for (int g = 0; g < group; ++g) {
      if (lanes[g].top() - phi[g] > kUnifiedHigh) return false;
    }
    return true;
  }
  // Whether phi, if it is given, served every head.
  bool end(const float* phi, int group) const {
    bool serves = true;
    for (int g = 0; g < group; ++g) {
      top[g] = base[g];
      if (phi == nullptr) continue;
      top[g] = lanes[g].top();
      sum[g] = lanes[g].total();
      serves = serves && stays_in_window(top[g], phi[g], sum[g]);
    }
    return serves;
  }
};

// Blocks between two looks for a score that is too high for phi: an attempt that must fail is
// given up after 1,024 keys.
constexpr int kLookBlocks = 16;

// Adds a block of keys to the sums of one sequence, and fetches the next block if it is given.
template <class T>
inline void decode_block(const Shape& shape, const SplitScratch& s, const BlockRows<T>& now,
                         const BlockRows<T>* next, int group, const float* phi, float growth,
                         float* out) {
  using Operands = DecodeOperands<T>;
  const int64_t head_size = shape.head_size;
  for_heads(group, [&](int g, auto heads) {
    const bool fetch = next != nullptr && g == 0;  // the heads after have them in the caches
    const auto* q = reinterpret_cast<const typename Operands::Query*>(s.q) + g * head_size;
    Operands::template score<heads>(shape, q, now.keys, now.count, s.scores + g * kBlock,
                                    [&](int n) {
                                      if (fetch) next->fetch_keys(n, head_size);
                                    });
  });
  for (int g = 0; g < group; ++g) {
    float* scores = s.scores + g * kBlock;
    for (int n = now.count; n < kBlock; ++n) scores[n] = -kInf;
    if (phi != nullptr) {
      unified_softmax_step(scores, phi[g], s.lanes + g);
    } else {
      decode_softmax_step(scores, s.base + g, s.sum + g, out + g * head_size, head_size, growth);
    }
  }
  for_heads(group, [&](int g, auto heads) {
    const bool fetch = next != nullptr && g == 0;
    Operands::template accumulate<heads>(s.scores + g * kBlock, now.values, now.count, head_size,
                                         out + g * head_size, [&](int n, int64_t d, int dims) {
                                           if (fetch) next->fetch_value(n, d, dims);
                                         });
  });
}

// Sums of `count` sequences over the same keys, those of w[0], against phi if it is given: base, sum
// and top of s, and out of w, not normalised. serves[i] is false where phi does not serve every head
// of a sequence; of one for which it was false before, nothing is done.
template <class T>
void decode_sums(const Decode& a, const SplitWork* w, const SplitScratch* s, int64_t count,
                 const float* phi, float growth, bool* serves) {
  const int64_t head_size = a.shape.head_size;
  const int group = static_cast<int>(a.shape.num_heads / a.shape.num_kv_heads);
  const Rows<T> rows(a.kv, w->seq, w->kv_head);
  for (int64_t i = 0; i < count; ++i) s[i].begin(phi, group, head_size, w[i].out);

  BlockRows<T> blocks[2];
  blocks[0].find(rows, w->first_key, w->last_key);
  int turn = 0;
  int64_t left = count;  // whom phi still serves
  int look = kLookBlocks;
  for (int64_t first = w->first_key; first < w->last_key && left > 0; first += kBlock, turn ^= 1) {
    const BlockRows<T>& now = blocks[turn];
    BlockRows<T>* next = &blocks[turn ^ 1];
    next->find(rows, first + kBlock, w->last_key);
    for (int64_t i = 0; i < count; ++i) {
      if (!serves[i]) continue;
      decode_block(a.shape, s[i], now, next, group, phi, growth, w[i].out);
      next = nullptr;  // fetched
    }
    if (phi != nullptr && --look == 0) {
      look = kLookBlocks;
      for (int64_t i = 0; i < count; ++i) {
        if (!serves[i] || s[i].below(phi, group)) continue;
        serves[i] = false;
        --left;
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) serves[i] = serves[i] && s[i].end(phi, group);
}

// Partial attention of the G query heads of a KV head over keys [first_key, last_key), of one
// sequence or of up to kMostTogether that have these keys in the same pages.
template <class T>
void decode_split(const Decode& a, const SplitWork* w, int64_t count, float* scratch) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const int group = static_cast<int>(shape.num_heads / shape.num_kv_heads);
  std::vector<SplitScratch> s;
  for (int64_t i = 0; i < count; ++i) {
    s.emplace_back(scratch + i * SplitScratch::floats(shape), group, head_size);
    for (int g = 0; g < group; ++g) {
      const T* from = static_cast<const T*>(a.q) + w[i].seq * a.q_row_stride +
                      (w[i].kv_head * group + g) * a.q_head_stride;
      auto* to = reinterpret_cast<typename DecodeOperands<T>::Query*>(s[i].q) + g * head_size;
      DecodeOperands<T>::take_query(shape, from, to);
    }
  }
  const float* phi = a.softmax == kUnified ? a.phi + w->kv_head * group : nullptr;
  const float growth = a.softmax == kLazy ? kLazyGrowth : 0.0f;
  bool serves[kMostTogether];
  for (int64_t i = 0; i < count; ++i) serves[i] = true;
  decode_sums<T>(a, w, s.data(), count, phi, growth, serves);
  for (int64_t i = 0; i < count; ++i) {
    // The heads of a group read the same rows: all of them again costs what one costs.
    if (!serves[i]) {
      serves[i] = true;
      decode_sums<T>(a, w + i, s.data() + i, 1, nullptr, 0.0f, serves + i);
    }
    for (int g = 0; g < group; ++g) {
      const float sum = s[i].sum[g];
      const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
      for (int64_t d = 0; d < head_size; ++d) w[i].out[g * head_size + d] *= inverse;
      w[i].lse[g] = sum > 0.0f ? s[i].base[g] + std::log(sum) : -kInf;
      w[i].highest[g] = s[i].top[g];
    }
  }
}

// Whether a row left the window of phi: over all of its keys, however they were split.
inline bool leaves_window(const float* highest, const float* lse, int64_t parts, int64_t stride,
                          float phi) {
  float top = -kInf, sum = 0.0f;
  for (int64_t p = 0; p < parts; ++p) {
    top = std::fmax(top, highest[p * stride]);
    // Cut where the highest score has decided already.
    sum += std::exp(std::fmin(lse[p * stride] - phi, 80.0f));
  }
  return parts > 0 && !stays_in_window(top, phi, sum);
}

template <class T>
void decode_merge(const Decode& a, int64_t seq, int64_t kv_head, float* parts_out,
                  const float* parts_lse, const float* parts_highest, int64_t parts) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const int64_t group = shape.num_heads / shape.num_kv_heads;
  for (int64_t g = 0; g < group; ++g) {
    const int64_t head = kv_head * group + g;
    float top = -kInf;
    for (int64_t p = 0; p < parts; ++p) top = std::fmax(top, parts_lse[p * group + g]);
    const float base = top == -kInf ? 0.0f : top;
    float sum = 0.0f;
    for (int64_t p = 0; p < parts; ++p) {
      const float weight = std::exp(parts_lse[p * group + g] - base);
      float* part = parts_out + (p * group + g) * head_size;
      float* first = parts_out + g * head_size;
      for (int64_t d = 0; d < head_size; d += kLanes) {
        const Vec weighted = load(part + d) * weight;
        store(first + d, p == 0 ? weighted : load(first + d) + weighted);
      }
      sum += weight;
    }
    T* out = static_cast<T*>(a.out) + seq * a.out_row_stride + head * a.out_head_stride;
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int64_t d = 0; d < head_size; d += kLanes) {
      const Vec value = parts > 0 ? load(parts_out + g * head_size + d) * inverse : Vec{};
      store_row(out + d, value);
    }
    a.lse[seq * shape.num_heads + head] = sum > 0.0f ? base + std::log(sum) : -kInf;
    if (a.softmax == kUnified && a.flagged != nullptr &&
        leaves_window(parts_highest + g, parts_lse + g, parts, group, a.phi[head])) {
      ++*a.flagged;
    }
  }
}

}  // namespace
}  // namespace vllm_sparse
