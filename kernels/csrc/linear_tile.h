// Linear layers of few rows: products of a panel of packed weights with up to kRowGroup rows.
//
// Lanes lie along the inputs, so neither side is broadcast, and packing is a copy. One row is a
// product of a matrix and a vector, which weights' way from memory bounds; up to some eight rows
// still are, if weights are fetched while others are multiplied.
#pragma once

#include "decode_products.h"

namespace vllm_sparse {
namespace {

constexpr int kMostRows = kLanes == 16 ? 4 : 2;  // rows whose accumulators fit the registers
constexpr int kLine = 64;
constexpr int kNear = 2048;  // bytes that one or two rows fetch ahead

// A layer's products are those of scores: weights are keys, and inputs the queries.
template <class T>
struct LinearProducts : ScoreProducts<T> {
  using Stored = T;
  using Input = typename DecodeOperands<T>::Query;
};

template <class P>
constexpr int64_t inputs_of_step() {
  return kStepBytes / static_cast<int64_t>(sizeof(typename P::Stored));
}

// Rows of inputs are a line apart from a power of two: those of a layer with 2048 inputs would all
// fall into the same eight lines of the first-level cache, which cost a quarter of the rate.
template <class P>
int64_t input_stride(int64_t num_inputs) {
  return steps_of(num_inputs, sizeof(typename P::Stored)) * inputs_of_step<P>() +
         kLine / sizeof(typename P::Input);
}

// sums[m, n] += inputs[m] . weights[n] of one strip's chunk, for `kRows` rows. kAhead lines are
// fetched at each step, from `ahead` until `end`.
template <int kRows, int kAhead, class P>
inline void strip_products(const typename P::Input* x, int64_t x_stride,
                           const typename P::Stored* w, int64_t steps, const char* ahead,
                           const char* end, float* sums) {
  constexpr int64_t step = inputs_of_step<P>();
  Vec acc[kMostRows * kStripRows] = {};
  for (int64_t s = 0; s < steps; ++s) {
    if (ahead < end) {
      for (int line = 0; line < kAhead; ++line, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < step; i += P::kStep) {
      Vec b[kStripRows];
#pragma GCC unroll 4
      for (int n = 0; n < kStripRows; ++n) b[n] = P::key(w + n * step, i, step);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const Vec a = P::query(x + m * x_stride, i, step);
#pragma GCC unroll 4
        for (int n = 0; n < kStripRows; ++n) {
          acc[m * kStripRows + n] = P::add(acc[m * kStripRows + n], a, b[n]);
        }
      }
    }
    w += kStripRows * step;
    x += step;
  }
#if defined(__AVX512F__)
  float sum[16];
  store(sum, sums_of_16(acc));
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kStripRows; ++n) sums[m * kPanel + n] += sum[m * kStripRows + n];
  }
#else
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
    const Vec* of = acc + m * kStripRows;
    Quad four;
    std::memcpy(&four, sums + m * kPanel, sizeof(four));
    four += vllm_sparse::sums(of[0], of[1], of[2], of[3]);
    std::memcpy(sums + m * kPanel, &four, sizeof(four));
  }
#endif
}

// Rows that are multiplied at once. As many as fit share a weight's load; but where the way from
// memory bounds (up to 11 rows), weights must come while others are multiplied, which passes of
// two or three rows leave room for: 4 rows at once 20 GB/s, as two and two 26 (AMD Zen 4, fp32).
inline int rows_at_once(int64_t rows) { return kMostRows == 4 && rows <= 11 ? 3 : kMostRows; }

template <int kAhead, class P>
inline void strip_of(int rows, const typename P::Input* x, int64_t x_stride,
                     const typename P::Stored* w, int64_t steps, const char* ahead,
                     const char* end, float* sums) {
  switch (rows) {
    case 1: return strip_products<1, kAhead, P>(x, x_stride, w, steps, ahead, end, sums);
    case 2: return strip_products<2, kAhead, P>(x, x_stride, w, steps, ahead, end, sums);
#if VLLM_SPARSE_LANES == 16
    case 3: return strip_products<3, kAhead, P>(x, x_stride, w, steps, ahead, end, sums);
    case 4: return strip_products<4, kAhead, P>(x, x_stride, w, steps, ahead, end, sums);
#endif
  }
}

// One strip's chunk for all rows of a group. Each pass over it fetches its share of the next; one
// or two rows, which do little else than wait for memory, fetch what comes soon (two rows, bfloat16:
// 29 GB/s, where 22 with the next strip, AMD Zen 4).
template <class P>
inline void strip_chunk(const typename P::Input* x, int64_t x_stride, int64_t rows,
                        const typename P::Stored* w, int64_t steps, float* sums) {
  const int64_t bytes = steps * kStripRows * kStepBytes;
  const char* next = reinterpret_cast<const char*>(w) + bytes;
  if (rows <= 2) {
    const char* ahead = next - bytes + kNear;
    return strip_of<kStripRows, P>(rows, x, x_stride, w, steps, ahead, ahead + bytes, sums);
  }
  const int64_t at_once = rows_at_once(rows), passes = (rows + at_once - 1) / at_once;
  for (int64_t pass = 0, row = 0; pass < passes; ++pass) {
    const int64_t left = passes - pass, take = (rows - row + left - 1) / left;
    const char* from = next + pass * bytes / passes;
    const char* to = next + (pass + 1) * bytes / passes;
    const auto* rows_of = x + row * x_stride;
    float* sums_of = sums + row * kPanel;
    if (passes == 1) {
      strip_of<4, P>(take, rows_of, x_stride, w, steps, from, to, sums_of);
    } else if (passes < 4) {
      strip_of<2, P>(take, rows_of, x_stride, w, steps, from, to, sums_of);
    } else {
      strip_of<1, P>(take, rows_of, x_stride, w, steps, from, to, sums_of);
    }
    row += take;
  }
}

// See Kernels::linear_panel. Scratch: [kRowGroup, kPanel].
template <class T>
void linear_panel(const Linear& a, int64_t panel, int64_t first_row, const void* rows,
                  float* sums) {
  using P = LinearProducts<T>;
  constexpr int64_t step = inputs_of_step<P>();
  const int64_t steps = steps_of(a.num_inputs, sizeof(T)), strips = strips_of(a.num_outputs, panel);
  const int64_t outputs = a.num_outputs - panel * kPanel;
  const int64_t left = a.num_rows - first_row, count = left < kRowGroup ? left : kRowGroup;
  const int64_t x_stride = input_stride<P>(a.num_inputs);
  const auto* x = static_cast<const typename P::Input*>(rows);
  const T* w = static_cast<const T*>(a.packed) + panel * kPanel * steps * step;
  std::memset(sums, 0, count * kPanel * sizeof(float));
  for (int64_t s = 0; s < steps; s += kChunk) {
    const int64_t chunk = steps - s < kChunk ? steps - s : kChunk;
    for (int64_t j = 0; j < strips; ++j, w += kStripRows * chunk * step) {
      strip_chunk<P>(x + s * step, x_stride, count, w, chunk, sums + j * kStripRows);
    }
  }
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t m = 0; m < count; ++m) {
    T* to = static_cast<T*>(a.out) + (first_row + m) * a.out_row_stride + panel * kPanel;
    for (int64_t n = 0; n < kPanel && n < outputs; ++n) {
      const float added = bias == nullptr ? 0.0f : to_float(bias[panel * kPanel + n]);
      from_float(sums[m * kPanel + n] + added, to + n);
    }
  }
}

template <class T>
size_t linear_row_bytes(const Linear& a) {
  using P = LinearProducts<T>;
  return input_stride<P>(a.num_inputs) * sizeof(typename P::Input);
}

inline void take_input(float from, float* to) { *to = from; }
inline void take_input(BFloat16 from, BFloat16* to) { *to = from; }
inline void take_input(BFloat16 from, float* to) { *to = to_float(from); }
inline void take_input(Float16 from, float* to) { *to = to_float(from); }

// See Kernels::linear_row; zeros after the last input, which packed weights have as well.
template <class T>
void linear_row(const Linear& a, int64_t row, void* to) {
  using P = LinearProducts<T>;
  const T* from = static_cast<const T*>(a.x) + row * a.x_row_stride;
  auto* inputs = static_cast<typename P::Input*>(to);
  for (int64_t i = 0; i < a.num_inputs; ++i) take_input(from[i], inputs + i);
  const int64_t padded = input_stride<P>(a.num_inputs);
  std::memset(inputs + a.num_inputs, 0, (padded - a.num_inputs) * sizeof(*inputs));
}

}  // namespace
}  // namespace vllm_sparse
