// What each row is expected to weigh, by the sketch of its key.
#pragma once

#include "chunk.h"
#include "host_select.h"
#include "sketch.h"
#include "vec_math.h"

namespace vllm_sparse {
namespace {

constexpr float kLog2E = 1.44269504f;

// An item's rows lie in whole steps of 16, from `base` on, of which the first and the last may
// hold rows that it does not read.
struct HostRange {
  int64_t first, last, base, count;
  explicit HostRange(const HostItem& item)
      : first(item.first),
        last(item.last),
        base(item.first / kStep * kStep),
        count((item.last - base + kStep - 1) / kStep * kStep) {}
};

// Powers of two of what the sketch expects, each page against a maximum of its own, so that every
// key is looked at once.
struct Expected {
  float* powers;   // [G, stride]
  float* highest;  // [G, pages] logits to base 2; then what a page's powers are multiplied with
  float* sums;     // [G, pages] of the powers
  int64_t stride, pages;  // whole vectors
  SketchQuery query;
};

// Fetches the sketches of a range's pages in the order in which they are read, a part of a page for
// each step of rows.
//
// Into the second-level cache, and so far ahead: pages lie anywhere, and a core alone reads 18 KB
// here and there at half of what its memory gives it. 12 KB ahead make it twice as fast on Zen 4,
// 4 KB ahead or into the first level nothing.
class SketchFeed {
 public:
  SketchFeed(const Host& h, const HostItem& item, const HostRange& r, const int64_t* segments)
      : h_(h),
        item_(item),
        segments_(segments),
        end_(r.base + r.count),
        bytes_(sketch_bytes(h)),
        ahead_((kAheadBytes << h.shift) / bytes_ / kStep * kStep) {
    for (int64_t row = r.base; row < r.base + ahead_; row += kStep) step(row);
  }

  // To be called with each step of rows.
  void ahead(int64_t row) const { step(row + ahead_); }

 private:
  static constexpr int64_t kAheadBytes = 12288;

  void step(int64_t row) const {
    if (row >= end_) return;
    const int64_t within = row & ((int64_t{1} << h_.shift) - 1);
    const Sketch s(h_, item_.layer, segments_[row >> h_.shift], item_.kv_head);
    const char* from = reinterpret_cast<const char*>(s.centre);
    const int64_t begin = bytes_ * within >> h_.shift, end = bytes_ * (within + kStep) >> h_.shift;
    fetch_lines(from + begin / 64 * 64, end - begin / 64 * 64);
  }

  const Host& h_;
  const HostItem& item_;
  const int64_t* segments_;
  int64_t end_, bytes_, ahead_;
};

// A page's powers for kHeads heads from g0 on: rows row .. stop - 1.
template <int kHeads>
inline void expect_page(const Host& h, const HostItem& item, const HostRange& r, const Expected& x,
                        const Sketch& sketch, const SketchFeed& feed, int g0, int64_t page,
                        int64_t row, int64_t stop) {
  constexpr int kVecsOfStep = kStep / kLanes;
  const int64_t size = h.head_size, page_rows = int64_t{1} << h.shift;
  float centre[kHeads], factor[kHeads];
  int32_t shift[kHeads];
  Vec most[kHeads];
  for (int g = 0; g < kHeads; ++g) {
    Vec dot = {};
    const float* q = item.q + (g0 + g) * size;
    for (int64_t d = 0; d < size; d += kLanes) dot += load(q + d) * load(sketch.centre + d);
    centre[g] = horizontal_sum(dot) * (h.scale * kLog2E);
    factor[g] = x.query.factor[g0 + g] * kLog2E;
    shift[g] = x.query.shift[g0 + g];
    most[g] = splat(-kInf);
  }
  float* to = x.powers + g0 * x.stride - r.base;
  for (int64_t n = row; n < stop; n += kStep) {
    if (g0 == 0) feed.ahead(n);
    const int64_t within = n & (page_rows - 1);
    SketchProducts products[kHeads];
    sketch_products<kHeads>(sketch.numbers + within * size / 2, x.query.q + g0 * size, size,
                            products);
#pragma GCC unroll 4
    for (int j = 0; j < kVecsOfStep; ++j) {
      const Vec step = load(sketch.steps + within + j * kLanes);
#pragma GCC unroll 4
      for (int g = 0; g < kHeads; ++g) {
        const Vec product = __builtin_convertvector(products[g][j] - shift[g], Vec);
        const Vec y = product * factor[g] * step + centre[g];
        store(to + g * x.stride + n + j * kLanes, y);
        most[g] = max(y, most[g]);
      }
    }
  }
  // Only at the range's ends are there rows that it does not read.
  if (row < r.first || stop > r.last) {
    for (int g = 0; g < kHeads; ++g) {
      float* p = to + g * x.stride;
      for (int64_t n = row; n < r.first; ++n) p[n] = -kInf;
      for (int64_t n = r.last; n < stop; ++n) p[n] = -kInf;
      most[g] = splat(-kInf);
      for (int64_t n = row; n < stop; n += kLanes) most[g] = max(load(p + n), most[g]);
    }
  }
  for (int g = 0; g < kHeads; ++g) {
    const float top = horizontal_max(most[g]);
    Vec sum = {};
    float* p = to + g * x.stride;
    for (int64_t n = row; n < stop; n += kLanes) {
      const Vec e = exp2_rough(load(p + n) - top);
      store(p + n, e);
      sum += e;
    }
    x.highest[(g0 + g) * x.pages + page] = top;
    x.sums[(g0 + g) * x.pages + page] = horizontal_sum(sum);
  }
}

// What the powers of each page are multiplied with, so that they add up to `mass` over the group.
// False where that is not known, as some number is not finite.
inline bool level_pages(const Expected& x, int64_t group, int64_t count, float mass) {
  for (int64_t g = 0; g < group; ++g) {
    float* highest = x.highest + g * x.pages;
    float* sums = x.sums + g * x.pages;
    float top = -kInf;
    for (int64_t p = 0; p < count; ++p) {
      if (!(std::fabs(highest[p]) < kInf)) return false;
      top = highest[p] > top ? highest[p] : top;
    }
    for (int64_t p = count; p < x.pages; ++p) highest[p] = top, sums[p] = 0.0f;
    Vec total = {};
    for (int64_t p = 0; p < x.pages; p += kLanes) {
      const Vec factor = exp2_rough(load(highest + p) - top);
      store(highest + p, factor);
      total += factor * load(sums + p);
    }
    const float each = mass / (horizontal_sum(total) * static_cast<float>(group));
    for (int64_t p = 0; p < x.pages; p += kLanes) store(highest + p, load(highest + p) * each);
  }
  return true;
}

// The share of the group's mass that each row is expected to hold, by a part of `even` that all
// hold alike: they add up to 1. False where that is not known, as some number is not finite.
// `segments`: of the request's pages.
inline bool expect_weights(const Host& h, const HostItem& item, const HostRange& r,
                           const int64_t* segments, const Expected& x, float even,
                           const Weights& w) {
  if (!sketch_query(item.q, h.group, h.head_size, h.scale, x.query)) return false;
  const int64_t end = r.base + r.count, first_page = r.base >> h.shift;
  const int group = static_cast<int>(h.group);
  const SketchFeed feed(h, item, r, segments);
  const auto for_pages = [&](const auto& with) {
    for (int64_t row = r.base; row < end;) {
      const int64_t page = row >> h.shift, after = (page + 1) << h.shift;
      const int64_t stop = after < end ? after : end;
      with(page, row, stop);
      row = stop;
    }
  };
  for_pages([&](int64_t page, int64_t row, int64_t stop) {
    const Sketch sketch(h, item.layer, segments[page], item.kv_head);
    for_heads(group, [&](int g, auto heads) {
      expect_page<heads>(h, item, r, x, sketch, feed, g, page - first_page, row, stop);
    });
  });
  const int64_t count = ((end - 1) >> h.shift) - first_page + 1;
  if (!level_pages(x, h.group, count, 1.0f - even)) return false;
  const Vec part = splat(even / static_cast<float>(r.last - r.first));
  for_pages([&](int64_t page, int64_t row, int64_t stop) {
    for_heads(group, [&](int g0, auto heads) {
      constexpr int kHeads = heads;
      const float* from = x.powers + g0 * x.stride - r.base;
      float* to = w.each - r.base;
      float factor[kHeads];
      for (int g = 0; g < kHeads; ++g) {
        factor[g] = x.highest[(g0 + g) * x.pages + page - first_page];
      }
      for (int64_t n = row; n < stop; n += kLanes) {
        Vec sum = g0 == 0 ? part : load(to + n);
#pragma GCC unroll 4
        for (int g = 0; g < kHeads; ++g) sum += load(from + g * x.stride + n) * factor[g];
        store(to + n, sum);
      }
    });
  });
  w.settle(r.first - r.base, r.last - r.base);
  return true;
}

}  // namespace
}  // namespace vllm_sparse
