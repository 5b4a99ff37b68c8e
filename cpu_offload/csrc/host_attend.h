// Attention of one token's heads of a KV head over a request's rows: all of them, or a sample.
#pragma once

#include "gather_split.h"
#include "host_append.h"
#include "host_select.h"
#include "lsh_query.h"
#include "sketch.h"

namespace vllm_sparse {
namespace {

constexpr int64_t kSmall = 3;  // a sample of more than 1 / kSmall of the rows reads all of them
constexpr int kRounds = 3;     // in which a sample may grow
constexpr float kMargin = 1.2f;  // by more than its own estimate asks for

// Scratch of an item of at most `rows` rows.
struct HostScratch {
  int64_t* segments;  // [pages]
  int64_t* found;     // [rows]
  float* weights;     // [rows]
  float* log_prob;    // [rows]
  float* logits;      // [G, rows]
  SketchQuery query;
  float* top;          // [G]
  float* direction;    // LSH: [D]
  float* projections;  // LSH: [columns]
  uint16_t* codes;     // LSH: [tables]
  uint8_t* hits;       // LSH: [rows of a page]
  float* rest;         // of gather

  static int64_t padded(int64_t rows) { return (rows + 2 * kStep - 1) / kStep * kStep + kStep; }

  template <class Take>
  static void lay_out(const Host& h, int64_t rows, const Take& take) {
    take(0, (rows >> h.shift) * 2 + 8);
    if (h.sampler == kExact) rows = 0;
    const int64_t n = padded(rows);
    take(1, 2 * n);
    take(2, n);
    take(3, n);
    take(4, h.group * n);
    take(5, h.group * (h.head_size / 4 + 3));
    take(6, h.head_size);
    take(7, (h.tables * h.bits + 63) / 64 * 64);
    take(8, h.tables / 2 + 1);
    take(9, (int64_t{1} << h.shift) / 4);
  }
  static size_t floats(const Host& h, int64_t rows, size_t rest) {
    size_t sum = rest;
    lay_out(h, rows, [&](int, int64_t count) { sum += (count + 15) / 16 * 16; });
    return sum;
  }
  HostScratch(const Host& h, int64_t rows, float* from) {
    float* at[10];
    lay_out(h, rows, [&](int i, int64_t count) {
      at[i] = from;
      from += (count + 15) / 16 * 16;
    });
    segments = reinterpret_cast<int64_t*>(at[0]);
    found = reinterpret_cast<int64_t*>(at[1]);
    weights = at[2], log_prob = at[3], logits = at[4];
    query.q = reinterpret_cast<int8_t*>(at[5]);
    query.factor = at[5] + h.group * h.head_size / 4;
    query.shift = reinterpret_cast<int32_t*>(query.factor + h.group);
    top = query.factor + 2 * h.group;
    direction = at[6], projections = at[7];
    codes = reinterpret_cast<uint16_t*>(at[8]);
    hits = reinterpret_cast<uint8_t*>(at[9]);
    rest = from;
  }
};

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

// Logits that the sketch expects, [G, count] at a stride of `stride`, and the largest of each head.
inline void expect_logits(const Host& h, const HostItem& item, const HostRange& r,
                          const HostScratch& s, int64_t stride, float* top) {
  const int64_t size = h.head_size, page_rows = int64_t{1} << h.shift;
  const int32_t* pages = h.table + item.slot * h.max_pages;
  for (int64_t g = 0; g < h.group; ++g) top[g] = -kInf;
  for (int64_t row = r.base; row < r.last;) {
    const int64_t page = row >> h.shift, end = (page + 1) << h.shift;
    const Sketch sketch(h, item.layer, pages[page], item.kv_head);
    const int64_t stop = end < r.base + r.count ? end : r.base + r.count;
    for_heads(static_cast<int>(h.group), [&](int g0, auto heads) {
      constexpr int kHeads = heads;
      float centre[kHeads];
      Vec highest[kHeads];
      for (int g = 0; g < kHeads; ++g) {
        float dot = 0.0f;
        const float* q = item.q + (g0 + g) * size;
        for (int64_t d = 0; d < size; ++d) dot += q[d] * sketch.centre[d];
        centre[g] = dot * h.scale;
        highest[g] = splat(-kInf);
      }
      for (int64_t n = row; n < stop; n += kStep) {
        const int64_t within = n & (page_rows - 1);
        int32_t products[kHeads][kSketchRows];
        sketch_products<kHeads>(sketch.numbers + within * size / 2, s.query.q + g0 * size, size,
                                products);
        for (int g = 0; g < kHeads; ++g) {
          float* to = s.logits + (g0 + g) * stride + n - r.base;
          for (int j = 0; j < kStep; j += kLanes) {
            IVec p;
            std::memcpy(&p, products[g] + j, sizeof(p));
            const Vec x = __builtin_convertvector(p - s.query.shift[g0 + g], Vec);
            const Vec y = x * s.query.factor[g0 + g] * load(sketch.steps + within + j) + centre[g];
            store(to + j, y);
          }
          if (n < r.first || n + kStep > r.last) {
            for (int j = 0; j < kStep; ++j) {
              if (n + j < r.first || n + j >= r.last) to[j] = -kInf;
            }
          }
          for (int j = 0; j < kStep; j += kLanes) highest[g] = max(load(to + j), highest[g]);
        }
      }
      for (int g = 0; g < kHeads; ++g) {
        for (int j = 0; j < kLanes; ++j) {
          top[g0 + g] = highest[g][j] > top[g0 + g] ? highest[g][j] : top[g0 + g];
        }
      }
    });
    row = stop;
  }
}

// weights[n]: the share of the group's mass that each row is expected to hold; they add up to 1.
// False where that is not known, as some number is not finite.
inline bool expect_weights(const Host& h, const HostItem& item, const HostRange& r,
                           const HostScratch& s) {
  const int64_t stride = r.count;
  float* top = s.top;
  if (!sketch_query(item.q, h.group, h.head_size, h.scale, s.query)) return false;
  expect_logits(h, item, r, s, stride, top);
  for (int64_t g = 0; g < h.group; ++g) {
    if (!(top[g] > -kInf && top[g] < kInf)) return false;
    float* x = s.logits + g * stride;
    Vec sum = {};
    for (int64_t i = 0; i < r.count; i += kLanes) {
      const Vec e = exp(load(x + i) - top[g]);
      store(x + i, e);
      sum += e;
    }
    const float total = horizontal_sum(sum);
    if (!(total > 0.0f && total < kInf)) return false;
    const float factor = 1.0f / (total * h.group);
    for (int64_t i = 0; i < r.count; i += kLanes) {
      const Vec before = g > 0 ? load(s.weights + i) : Vec{};
      store(s.weights + i, before + load(x + i) * factor);
    }
  }
  return true;
}

// Gives every row that is read its even part of the chance.
inline void mix(const HostRange& r, float even, float* weights) {
  const float part = even / static_cast<float>(r.last - r.first);
  for (int64_t i = r.first - r.base; i < r.last - r.base; ++i) {
    weights[i] = (1.0f - even) * weights[i] + part;
  }
}

// A sample by expected weight, and every row that shares two buckets with the query (MagicPIG) or,
// where those are more than `room`, an even part of them. The two are drawn without regard to each
// other, so a row is in either of them with probability 1 - (1 - p) (1 - u).
template <class T>
void choose_lsh(const Host& h, const HostItem& item, const HostRange& r, const HostScratch& s,
                const RowView& view, float c, float u, int64_t room, Chosen* chosen) {
  constexpr uint8_t kDrawn = 1, kHit = 2;
  Lsh a = {};
  a.head_size = h.head_size, a.group = h.group, a.bits = h.bits, a.tables = h.tables;
  a.directions = h.directions, a.log_inclusion = h.log_inclusion;
  LshScratch lsh(a, s.direction);
  lsh.direction = s.direction, lsh.projection = s.projections, lsh.codes = s.codes;
  mean_direction(a, item.q, lsh.direction);
  hash_query(a, lsh);
  uint8_t* marks = reinterpret_cast<uint8_t*>(s.logits);  // not needed any more
  std::memset(marks, 0, r.count);
  for (int64_t n = 0; n < chosen->count; ++n) marks[chosen->rows[n] - r.base] = kDrawn;
  const int32_t* pages = h.table + item.slot * h.max_pages;
  const int64_t page_rows = int64_t{1} << h.shift;
  int64_t hits = 0;
  for (int64_t page = r.first >> h.shift; page << h.shift < r.last; ++page) {
    const Sketch sketch(h, item.layer, pages[page], item.kv_head);
    std::memset(s.hits, 0, page_rows);
    for (int64_t t = 0; t < h.tables; ++t) {
      const uint8_t* codes = sketch.codes + (t << h.shift);
      const uint8_t code = static_cast<uint8_t>(s.codes[t]);
      for (int64_t i = 0; i < page_rows; ++i) s.hits[i] += codes[i] == code;
    }
    const int64_t start = page << h.shift;
    const int64_t begin = r.first > start ? r.first - start : 0;
    const int64_t end = r.last - start < page_rows ? r.last - start : page_rows;
    uint8_t* to = marks + start - r.base;
    for (int64_t i = begin; i < end; ++i) {
      const bool hit = s.hits[i] >= 2;
      to[i] |= hit ? kHit : 0;
      hits += hit;
    }
  }
  const double part = hits > room ? static_cast<double>(room) / hits : 1.0;
  double sum = 0.0, next = hits > room ? u : 0.0;
  chosen->count = 0;
  for (int64_t i = 0; i < r.count; ++i) {
    if ((i & 7) == 0) {  // rows are counted in whole steps, so there are always eight
      uint64_t eight;
      std::memcpy(&eight, marks + i, sizeof(eight));
      if (eight == 0) {
        i += 7;
        continue;
      }
    }
    if (marks[i] == 0) continue;
    bool take = marks[i] & kDrawn;
    if (marks[i] & kHit) {
      sum += part;
      if (sum >= next) take = true, next += part < 1.0 ? 1.0 : 0.0;
    }
    if (!take) continue;
    const int64_t row = r.base + i;
    const float drawn = s.weights[i] * c;
    if (drawn >= 1.0f) {
      chosen->enter(row, 0.0f);
      continue;
    }
    const Sketch sketch(h, item.layer, pages[row >> h.shift], item.kv_head);
    const T* key = reinterpret_cast<const T*>(view.rows + row_offset(view, row, view.row_bytes));
    const float scale = std::is_same<T, Int8>::value ? row_scales(view, row)[0] : 1.0f;
    const float hit = std::exp(inclusion(a, key, sketch.centre, scale, lsh.direction).log_prob);
    const float either = drawn + hit * static_cast<float>(part) * (1.0f - drawn);
    chosen->enter(row, std::log(std::fmin(either, 1.0f)));
  }
}

// The largest relative variance of a head's output that its sample shows: the sum over sampled rows
// of p^2 (1 - u) |v - out|^2, where p is a row's share of the estimate, against the mean square of
// the values that it attends to, the sum of p |v|^2. Against |out|^2, heads whose values cancel out,
// of which little is left in the model, would have to read nearly everything.
template <class T>
float relative_variance(const Host& h, const Gather& a, const GatherItem& item, float* scratch) {
  float* dots = scratch;  // [G, 64]
  float* along = dots + a.group * kBlock;
  float* sums = along + a.group * kBlock;  // [G]
  float* norms = sums + a.group;           // [G]
  float* squares_of = norms + a.group;     // [G]
  for (int64_t g = 0; g < a.group; ++g) {
    sums[g] = norms[g] = squares_of[g] = 0.0f;
    for (int64_t d = 0; d < a.head_size; ++d) {
      norms[g] += item.out[g * a.head_size + d] * item.out[g * a.head_size + d];
    }
  }
  Chunk<T> chunk;
  for (int64_t first = 0; first < item.count; first += kBlock) {
    chunk.find(item.view, item.rows, first, item.count);
    for_heads(static_cast<int>(a.group), [&](int g, auto heads) {
      decode_score<heads>(item.q + g * a.head_size, chunk.keys, chunk.count, a.head_size,
                          dots + g * kBlock, [](int) {});
      decode_score<heads>(item.out + g * a.head_size, chunk.values, chunk.count, a.head_size,
                          along + g * kBlock, [](int) {});
    });
    for (int n = 0; n < chunk.count; ++n) {
      const float log_prob = item.log_prob[first + n];
      float of_key = 1.0f, of_value = 1.0f;
      if (std::is_same<T, Int8>::value) {
        of_key = row_scales(item.view, chunk.rows[n])[0];
        of_value = row_scales(item.view, chunk.rows[n])[1];
      }
      Vec squares = {};
      for (int64_t d = 0; d < a.head_size; d += kLanes) {
        const Vec x = load_row(chunk.values[n] + d);
        squares += x * x;
      }
      const float norm = horizontal_sum(squares) * of_value * of_value;
      const float left = 1.0f - std::exp(log_prob);
      for (int64_t g = 0; g < a.group; ++g) {
        const float logit = dots[g * kBlock + n] * of_key * h.scale - log_prob - item.lse[g];
        const float p = std::exp(logit);
        const float away = norm - 2.0f * along[g * kBlock + n] * of_value + norms[g];
        sums[g] += p * p * left * (away > 0.0f ? away : 0.0f);
        squares_of[g] += p * norm;
      }
    }
  }
  float most = 0.0f;
  for (int64_t g = 0; g < a.group; ++g) {
    const float x = squares_of[g] > 0.0f ? sums[g] / squares_of[g] : 0.0f;
    most = x > most ? x : most;
  }
  return most;
}

// A number 0 < u <= 1 that depends on the token, the layer and the head, and on nothing else: who
// answers, and in which batch, does not change what is sampled.
inline float drawn(const HostItem& item, int64_t round) {
  uint64_t x = static_cast<uint64_t>(item.last) * 0x9e3779b97f4a7c15u +
               static_cast<uint64_t>(item.layer * 4096 + item.kv_head * 8 + round);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return (static_cast<float>(x >> 40) + 1.0f) * 0x1p-24f;
}

template <class T>
void attend_rows(const Host& h, HostItem& item, float* scratch) {
  const HostRange r(item);
  const int64_t rows = item.last - item.first;
  const HostScratch s(h, rows, scratch);
  const int32_t* pages = h.table + item.slot * h.max_pages;
  RowView view = {};
  const int64_t row_bytes = 2 * h.head_size * sizeof(T);
  char* layer = h.parts + item.layer * h.layer_bytes;
  view.rows = layer + (item.kv_head << h.shift) * row_bytes;
  view.scales = layer + h.scales_at + (item.kv_head << h.shift) * kScaleBytes;
  view.shift = h.shift, view.row_bytes = row_bytes, view.length = item.last;
  // Row numbers stay those of the request; only the pages that are read are looked up.
  const int64_t first_page = item.first >> h.shift;
  for (int64_t p = first_page; p << h.shift < item.last; ++p) {
    s.segments[p - first_page] = pages[p] * h.part_bytes;
  }
  view.segments = s.segments - first_page;

  Gather a = {h.dtype, h.head_size, h.group, true, h.scale};
  for (int64_t i = 0; i < h.group * h.head_size && a.bf16_queries; ++i) {
    a.bf16_queries = (float_to_bits(item.q[i]) & 0xffff) == 0;
  }
  GatherItem gather = {view, item.q, nullptr, nullptr, rows, item.out, item.lse};
  const auto read_all = [&] {
    gather.rows = nullptr, gather.log_prob = nullptr;
    gather_any(a, {&gather, item.first, item.last, item.out, item.lse}, s.rest);
    item.rows_read = rows;
  };
  const bool budgeted = h.rows > 0;
  const int64_t share = static_cast<int64_t>(h.share * static_cast<float>(rows));
  int64_t most = budgeted ? h.rows : share > h.least ? share : h.least;
  const auto small = [&] { return budgeted ? most < rows : most * kSmall < rows; };
  if (h.sampler == kExact || !small() || !expect_weights(h, item, r, s)) return read_all();
  if (h.sampler != kTopK) mix(r, h.even, s.weights);

  Chosen chosen = {s.found, s.log_prob, 0};
  for (int round = 0;; ++round) {
    chosen.count = 0;
    const float u = drawn(item, round);
    if (h.sampler == kTopK) {
      choose_largest(s.weights, r.count, r.base, most, &chosen);
    } else {
      // With a budget, rows that collide take up to half of it.
      const int64_t drawn = h.sampler == kLsh && budgeted ? most - most / 2 : most;
      const float c = share_out(s.weights, r.count, static_cast<float>(drawn));
      choose(s.weights, r.count, c, u, r.base, drawn + 1, &chosen);
      const int64_t room = budgeted ? most / 2 : rows;
      if (h.sampler == kLsh) choose_lsh<T>(h, item, r, s, view, c, u, room, &chosen);
    }
    gather.rows = chosen.rows, gather.log_prob = chosen.log_prob, gather.count = chosen.count;
    gather_any(a, {&gather, 0, chosen.count, item.out, item.lse}, s.rest);
    item.rows_read = chosen.count;
    if (budgeted || h.epsilon <= 0.0f || h.sampler != kVAttention || round == kRounds - 1) return;
    const float need = relative_variance<T>(h, a, gather, s.rest) * h.quantile * h.quantile /
                       (h.epsilon * h.epsilon);
    if (!(need > 1.0f)) return;
    most = static_cast<int64_t>(kMargin * need * static_cast<float>(most)) + 1;
    if (!(need < 1e6f) || !small()) return read_all();
  }
}

size_t attend_scratch(const Host& h, int64_t rows) {
  const Gather a = {h.dtype, h.head_size, h.group, true, h.scale};
  const size_t gather = gather_scratch(a), variance = 2 * h.group * kBlock + 3 * h.group;
  return HostScratch::floats(h, rows, gather > variance ? gather : variance);
}

void attend_any(const Host& h, HostItem& item, float* scratch) {
  for_rows(h.dtype, [&](auto row) { attend_rows<decltype(row)>(h, item, scratch); });
}

void append_any(const Host& h, const HostAppend& a, const HostPiece& p, float* scratch) {
  for_floats(a.dtype, [&](auto from) {
    for_rows(h.dtype, [&](auto to) {
      append_piece<decltype(from), decltype(to)>(h, a, p, scratch);
    });
  });
}

size_t append_scratch_any(const Host& h) { return append_scratch(h); }

}  // namespace
}  // namespace vllm_sparse
