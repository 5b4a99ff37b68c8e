// Decode: the query heads of one KV head over a range of one sequence's keys, or of keys that some
// sequences share, and the merge of such ranges. Lanes lie along the head size; each key and value
// is read from memory once for all the heads, and once for all that share it.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "decode_softmax.h"
#include "rows.h"
#include "vec.h"

namespace vllm_sparse {
namespace {

// Query heads whose accumulators fit the registers beside four keys.
constexpr int kDecodeHeads = kLanes == 16 ? 4 : 2;

// The sums of the lanes of four vectors.
inline Quad sums(Vec a, Vec b, Vec c, Vec d) {
  const Quad w = fold(a), x = fold(b), y = fold(c), z = fold(d);
  const Quad wx = __builtin_shufflevector(w, x, 0, 4, 2, 6) + __builtin_shufflevector(w, x, 1, 5, 3, 7);
  const Quad yz = __builtin_shufflevector(y, z, 0, 4, 2, 6) + __builtin_shufflevector(y, z, 1, 5, 3, 7);
  return __builtin_shufflevector(wx, yz, 0, 1, 4, 5) + __builtin_shufflevector(wx, yz, 2, 3, 6, 7);
}

// Rows of K that are fetched into the first-level cache ahead: without, a third of decode was
// waiting for them (4096 keys in bf16, D = 128). From memory that is too late, so that the rows of
// the next block are fetched into the second level as well: at 32K keys decode takes half of the
// time that it takes without.
constexpr int kAhead = 8;

// scores[g, n] = q[g] . keys[n] for `kGroup` query heads and `count` keys, rounded up to fours.
// ahead(n) is called before keys n .. n + 3, to fetch what comes later.
template <int kGroup, class T, class Ahead>
inline void decode_score(const float* q, const T* const* keys, int count, int64_t head_size,
                         float* scores, const Ahead& ahead) {
  for (int n = 0; n < count; n += 4) {
    ahead(n);
    Vec acc[kGroup][4] = {};
    for (int64_t d = 0; d < head_size; d += kLanes) {
      Vec x[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = load_row(keys[n + i] + d);
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) {
        const Vec y = load(q + g * head_size + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[g][i] += y * x[i];
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroup; ++g) {
      const Quad four = sums(acc[g][0], acc[g][1], acc[g][2], acc[g][3]);
      std::memcpy(scores + g * kBlock + n, &four, sizeof(four));
    }
  }
}

// out[g, d ..] += sum_n scores[g, n] * values[n, d ..] for `kGroup` heads and `kSteps` vectors.
template <int kGroup, int kSteps, class T>
inline void decode_accumulate_strip(const float* scores, const T* const* values, int count,
                                    int64_t head_size, int64_t d, float* out) {
  Vec acc[kGroup][kSteps];
#pragma GCC unroll 4
  for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) acc[g][j] = load(out + g * head_size + d + j * kLanes);
  for (int n = 0; n < count; ++n) {
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) {
      const Vec x = load_row(values[n] + d + j * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < kGroup; ++g) acc[g][j] += scores[g * kBlock + n] * x;
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 4
    for (int j = 0; j < kSteps; ++j) store(out + g * head_size + d + j * kLanes, acc[g][j]);
}

template <int kGroup, class T>
inline void decode_accumulate(const float* scores, const T* const* values, int count,
                              int64_t head_size, float* out) {
  int64_t d = 0;
  for (; d + 2 * kLanes <= head_size; d += 2 * kLanes) {
    decode_accumulate_strip<kGroup, 2>(scores, values, count, head_size, d, out);
  }
  if (d < head_size) decode_accumulate_strip<kGroup, 1>(scores, values, count, head_size, d, out);
}

// Calls step(first head, integral constant of how many) over the group, most heads at a time first.
template <class Step>
inline void for_heads(int group, const Step& step) {
  int g = 0;
  for (; kDecodeHeads >= 4 && g + 4 <= group; g += 4) step(g, std::integral_constant<int, 4>());
  for (; g + 2 <= group; g += 2) step(g, std::integral_constant<int, 2>());
  for (; g < group; ++g) step(g, std::integral_constant<int, 1>());
}

// What a split works with for one sequence, in the scratch of one thread.
struct SplitScratch {
  float* q;            // [G, D], scaled
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

// Adds up to 64 keys to the sums of one sequence. ahead as in decode_score.
template <class T, class Ahead>
inline void decode_block(const SplitScratch& s, const T* const* keys, const T* const* values,
                         int count, int group, int64_t head_size, const float* phi, float growth,
                         float* out, const Ahead& ahead) {
  for_heads(group, [&](int g, auto heads) {
    const float* q = s.q + g * head_size;
    float* scores = s.scores + g * kBlock;
    if (g == 0) {
      decode_score<heads>(q, keys, count, head_size, scores, ahead);
    } else {
      decode_score<heads>(q, keys, count, head_size, scores, [](int) {});
    }
  });
  for (int g = 0; g < group; ++g) {
    float* scores = s.scores + g * kBlock;
    for (int n = count; n < kBlock; ++n) scores[n] = -kInf;
    if (phi != nullptr) {
      unified_softmax_step(scores, phi[g], s.lanes + g);
    } else {
      decode_softmax_step(scores, s.base + g, s.sum + g, out + g * head_size, head_size, growth);
    }
  }
  for_heads(group, [&](int g, auto heads) {
    decode_accumulate<heads>(s.scores + g * kBlock, values, count, head_size, out + g * head_size);
  });
}

// Sums of `count` sequences over the same keys, those of w[0], against phi if it is given: base, sum
// and top of s, and out of w, not normalised. serves[i] is false where phi does not serve every head
// of a sequence; of one for which it was false before, nothing is done.
template <class T>
void decode_sums(const Decode& a, const SplitWork* w, const SplitScratch* s, int64_t count,
                 const float* phi, float growth, bool* serves) {
  const int64_t head_size = a.shape.head_size;
  const int64_t row_bytes = head_size * static_cast<int64_t>(sizeof(T));
  const int group = static_cast<int>(a.shape.num_heads / a.shape.num_kv_heads);
  const Rows<T> rows(a.kv, w->seq, w->kv_head);
  for (int64_t i = 0; i < count; ++i) s[i].begin(phi, group, head_size, w[i].out);

  constexpr int kRows = 2 * kBlock;  // this block's and the next's, the last ones repeated
  int64_t positions[kRows];
  const T* keys[kRows];
  const T* values[kRows];
  int64_t left = count;  // whom phi still serves
  int look = kLookBlocks;
  for (int64_t first = w->first_key; first < w->last_key && left > 0; first += kBlock) {
    const int64_t rest = w->last_key - first;
    const int here = static_cast<int>(rest < kBlock ? rest : kBlock);
    const int found = static_cast<int>(rest < kRows ? rest : kRows);
    for (int n = 0; n < found; ++n) positions[n] = first + n;
    rows.find(positions, found, keys, values);
    for (int n = found; n < kRows; ++n) keys[n] = keys[found - 1];
    const auto ahead = [&](int n) {
      for (int i = here + n; i < here + n + 4 && i < found; ++i) {
        fetch_lines(keys[i], row_bytes);
        fetch_lines(values[i], row_bytes);
      }
      for (int i = n; i < n + 4; ++i) fetch_lines<3>(keys[i + kAhead], row_bytes);
    };
    bool fetched = false;
    for (int64_t i = 0; i < count; ++i) {
      if (!serves[i]) continue;
      if (!fetched) {
        decode_block(s[i], keys, values, here, group, head_size, phi, growth, w[i].out, ahead);
      } else {  // the one before has them in the caches
        decode_block(s[i], keys, values, here, group, head_size, phi, growth, w[i].out,
                     [](int) {});
      }
      fetched = true;
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
      for (int64_t d = 0; d < head_size; ++d) {
        s[i].q[g * head_size + d] = to_float(from[d]) * shape.scale;
      }
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
