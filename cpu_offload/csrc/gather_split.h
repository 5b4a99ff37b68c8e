// Attention of the query heads of one KV head over a list of rows. The arithmetic is a policy:
// rows widened to fp32 here, bfloat16 products in gather_bf16.h, int8 products in gather_int8.h.
#pragma once

#include "chunk.h"

namespace vllm_sparse {
namespace {

// Rows of any type, widened to fp32 in registers.
template <class Row>
struct Widened {
  using T = Row;
  const int64_t head_size;
  const int group;
  const float* q;

  static size_t floats(const Gather&) { return 0; }
  static int64_t stride(int64_t head_size) { return head_size; }

  Widened(const Gather& a, const GatherItem& item, float*)
      : head_size(a.head_size), group(static_cast<int>(a.group)), q(item.q) {}

  // scores[g * 64 + n], not scaled.
  void score(const Chunk<T>& now, Feed& feed, float* scores) const {
    const int lines = static_cast<int>(4 * 2 * head_size * sizeof(T) / 64) + 1;
    for_heads(group, [&](int g, auto heads) {
      decode_score<heads>(q + g * head_size, now.keys, now.count, head_size, scores + g * kBlock,
                          [&](int) {
                            if (g > 0) return;
                            feed.far(lines);
                            feed.near(lines);
                          });
    });
  }

  void accumulate(const Chunk<T>& now, Feed&, const float* weights, float* out) const {
    for_heads(group, [&](int g, auto heads) {
      decode_accumulate<heads>(weights + g * kBlock, now.values, now.count, head_size,
                               out + g * head_size, [](int, int64_t, int) {});
    });
  }

  // Where a policy keeps dimension d of an output row.
  static int64_t place(int64_t d) { return d; }
};

template <class Policy>
size_t gather_floats(const Gather& a) {
  return a.group * (Policy::stride(a.head_size) + kBlock + 2) + 16 + Policy::floats(a);
}

// Logits: the score times the scale and that of the row, less the logarithm of the probability
// with which the row was chosen.
template <class T>
inline void to_logits(const Gather& a, const GatherItem& item, const Chunk<T>& chunk,
                      int64_t first, float* scores) {
  float factor[kBlock], shift[kBlock];
  const bool scaled = std::is_same<T, Int8>::value, shifted = item.log_prob != nullptr;
  for (int n = 0; scaled && n < kBlock; ++n) {
    factor[n] = n < chunk.count ? row_scales(item.view, chunk.rows[n])[0] : 0.0f;
  }
  if (shifted) {
    std::memset(shift, 0, sizeof(shift));
    std::memcpy(shift, item.log_prob + first, chunk.count * sizeof(float));
  }
  for (int64_t g = 0; g < a.group; ++g) {
    float* s = scores + g * kBlock;
    for (int n = 0; n < kBlock; n += kLanes) {
      Vec x = load(s + n) * a.scale;
      if (scaled) x *= load(factor + n);
      if (shifted) x -= load(shift + n);
      store(s + n, x);
    }
    for (int n = chunk.count; n < kBlock; ++n) s[n] = -kInf;
  }
}

// False where a row is none of the context.
template <class Policy>
bool gather_split(const Gather& a, const GatherSplit& w, float* scratch) {
  using T = typename Policy::T;
  const GatherItem& item = *w.item;
  const int group = static_cast<int>(a.group);
  const int64_t stride = Policy::stride(a.head_size);
  float* out = scratch;                  // [G, stride], not normalised
  float* scores = out + group * stride;  // [G, 64]
  float* top = scores + group * kBlock;  // [G]
  float* sum = top + group;              // [G]
  const int64_t used = sum + group - scratch;
  const Policy policy(a, item, scratch + (used + 15) / 16 * 16);  // 64-byte aligned
  for (int g = 0; g < group; ++g) top[g] = -kInf, sum[g] = 0.0f;
  std::memset(out, 0, group * stride * sizeof(float));

  Chunk<T> chunks[2];
  chunks[1].count = 0;
  if (!chunks[0].find(item.view, item.rows, w.first, w.last)) return false;
  Feed(chunks[1], chunks[0], item.view.row_bytes).far(INT32_MAX);
  int turn = 0;
  for (int64_t first = w.first; first < w.last; first += kBlock, turn ^= 1) {
    const Chunk<T>& now = chunks[turn];
    Chunk<T>& next = chunks[turn ^ 1];
    if (!next.find(item.view, item.rows, first + kBlock, w.last)) return false;
    if (std::is_same<T, Int8>::value) {
      for (int n = 0; n < next.count; ++n) __builtin_prefetch(row_scales(item.view, next.rows[n]));
    }
    Feed feed(now, next, item.view.row_bytes);
    policy.score(now, feed, scores);
    to_logits(a, item, now, first, scores);
    for (int g = 0; g < group; ++g) {
      decode_softmax_step(scores + g * kBlock, top + g, sum + g, out + g * stride, stride);
    }
    if (std::is_same<T, Int8>::value) {
      float scales[kBlock] = {};
      for (int n = 0; n < now.count; ++n) scales[n] = row_scales(item.view, now.rows[n])[1];
      for (int i = 0; i < group * kBlock; i += kLanes) {
        store(scores + i, load(scores + i) * load(scales + i % kBlock));
      }
    }
    policy.accumulate(now, feed, scores, out);
  }
  for (int g = 0; g < group; ++g) {
    const float inverse = sum[g] > 0.0f ? 1.0f / sum[g] : 0.0f;
    for (int64_t d = 0; d < a.head_size; ++d) {
      w.out[g * a.head_size + d] = out[g * stride + Policy::place(d)] * inverse;
    }
    w.lse[g] = sum[g] > 0.0f ? top[g] + std::log(sum[g]) : -kInf;
  }
  return true;
}

}  // namespace
}  // namespace vllm_sparse
