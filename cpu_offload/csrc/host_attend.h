// Attention of one token's heads of a KV head over a request's rows: all of them, or a sample.
#pragma once

#include "gather_split.h"
#include "host_append.h"
#include "host_expect.h"
#include "host_lsh.h"
#include "host_variance.h"

namespace vllm_sparse {
namespace {

constexpr int64_t kSmall = 3;  // a sample of more than 1 / kSmall of the rows reads all of them
constexpr int kRounds = 3;     // in which a sample may grow
constexpr float kMargin = 1.2f;  // by more than its own estimate asks for

// Scratch of an item of at most `rows` rows.
struct HostScratch {
  int64_t* segments;  // [pages]
  int64_t* found;     // [rows]
  float* log_prob;    // [rows]
  Weights weights;
  Expected expected;
  HashScratch hash;
  float* rest;  // of gather

  // Calls take(number of floats) for each of kParts parts.
  static constexpr int kParts = 13;
  template <class Take>
  static void lay_out(const Host& h, int64_t rows, const Take& take) {
    take((rows >> h.shift) * 2 + 8);
    if (h.sampler == kExact) rows = 0;
    const int64_t n = padded(rows);
    take(2 * n);
    take(n);
    take(n);
    take(2 * Weights::steps(n));
    take(h.group * n);
    take(2 * h.group * pages(h, n));
    take(h.group * (h.head_size / 4 + 2));
    take(h.head_size);
    take((h.tables * h.bits + 63) / 64 * 64);
    take(h.tables / 2 + 1);
    take((int64_t{1} << h.shift) / 4);
    take(h.tables > 0 ? n / 4 : 0);
  }
  // A range of so many rows, with what is beside it in the steps that it begins and ends in.
  static int64_t padded(int64_t rows) { return Weights::rows(rows + 2 * kStep); }
  static int64_t pages(const Host& h, int64_t rows) {
    return ((rows >> h.shift) + 2 + 15) / 16 * 16;
  }

  static size_t floats(const Host& h, int64_t rows, size_t rest) {
    size_t sum = rest;
    lay_out(h, rows, [&](int64_t count) { sum += (count + 15) / 16 * 16; });
    return sum;
  }
  // Of an item of r.count rows.
  HostScratch(const Host& h, const HostRange& r, int64_t rows, float* from) {
    float* at[kParts];
    int part = 0;
    lay_out(h, rows, [&](int64_t count) {
      at[part++] = from;
      from += (count + 15) / 16 * 16;
    });
    segments = reinterpret_cast<int64_t*>(at[0]);
    found = reinterpret_cast<int64_t*>(at[1]);
    log_prob = at[2];
    weights = {at[3], at[4], at[4] + Weights::steps(r.count), r.count};
    const int64_t count = pages(h, padded(rows));
    expected = {at[5], at[6], at[6] + h.group * count, r.count, count, {}};
    expected.query.q = reinterpret_cast<int8_t*>(at[7]);
    expected.query.factor = at[7] + h.group * h.head_size / 4;
    expected.query.shift = reinterpret_cast<int32_t*>(expected.query.factor + h.group);
    hash = {at[8], at[9], reinterpret_cast<uint16_t*>(at[10]), reinterpret_cast<uint8_t*>(at[11]),
            reinterpret_cast<uint8_t*>(at[12])};
    rest = from;
  }
};

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
  const HostScratch s(h, r, rows, scratch);
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
    const int64_t page = page_of(h, pages, p);
    if (page < 0) {
      item.rows_read = kLost;
      return;
    }
    s.segments[p - first_page] = page * h.part_bytes;
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
  const float even = h.sampler == kTopK ? 0.0f : h.even;
  const Weights& weights = s.weights;
  if (h.sampler == kExact || !small() ||
      !expect_weights(h, item, r, view.segments, s.expected, even, weights)) {
    return read_all();
  }

  Chosen chosen = {s.found, s.log_prob, 0};
  for (int round = 0;; ++round) {
    chosen.count = 0;
    const float u = drawn(item, round);
    if (h.sampler == kTopK) {
      choose_largest(weights, r.base, most, s.expected.powers, &chosen);
    } else {
      // With a budget, rows that collide take up to half of it.
      const int64_t drawn = h.sampler == kLsh && budgeted ? most - most / 2 : most;
      const float c = share_out(weights, static_cast<float>(drawn));
      choose(weights, c, u, r.base, drawn + 1, &chosen);
      const int64_t room = budgeted ? most / 2 : rows;
      if (h.sampler == kLsh) {
        choose_lsh<T>(h, item, r, s.hash, weights.each, view, c, u, room, &chosen);
      }
    }
    log_probabilities(chosen.log_prob, chosen.count);
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
  const size_t gather = gather_scratch(a), variance = variance_floats(h.group);
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
