// Rows on their way into a page, and into what samplers know of it.
#pragma once

#include <cmath>

#include "int8_row.h"
#include "sketch.h"

namespace vllm_sparse {
namespace {

constexpr int kHashRows = 4;  // keys that are hashed together

inline int64_t hash_columns(const Host& h) { return (h.tables * h.bits + 63) / 64 * 64; }

inline size_t append_scratch(const Host& h) {
  return kHashRows * (h.head_size + (h.sampler == kLsh ? hash_columns(h) : 0)) + 64;
}

// Hash codes of `count` keys x [count, D], at most kHashRows.
inline void hash_keys(const Host& h, const float* x, int count, float* projections, uint8_t* codes,
                      int64_t row) {
  const int64_t columns = h.tables * h.bits, stride = hash_columns(h);
  std::memset(projections, 0, kHashRows * stride * sizeof(float));
  for (int64_t c = 0; c < columns; c += 64) {
    const int64_t end = columns - c < 64 ? columns - c : 64;
    for (int64_t d = 0; d < h.head_size; ++d) {
      const float* r = h.directions + d * columns + c;
      for (int i = 0; i < count; ++i) {
        const float y = x[i * h.head_size + d];
        float* to = projections + i * stride + c;
        if (end == 64) {
#pragma GCC unroll 16
          for (int j = 0; j < 64; j += kLanes) store(to + j, load(to + j) + load(r + j) * y);
        } else {
          for (int64_t j = 0; j < end; ++j) to[j] += r[j] * y;
        }
      }
    }
  }
  for (int i = 0; i < count; ++i) {
    for (int64_t t = 0; t < h.tables; ++t) {
      uint8_t code = 0;
      for (int64_t k = 0; k < h.bits; ++k) {
        code |= static_cast<uint8_t>(projections[i * stride + t * h.bits + k] > 0.0f) << k;
      }
      codes[(t << h.shift) + row + i] = code;
    }
  }
}

template <class From, class To>
inline void keep_row(const From* from, int64_t n, char* to, float*, To) {
  To* row = reinterpret_cast<To*>(to);
  for (int64_t d = 0; d < n; ++d) from_float(to_float(from[d]), row + d);
}

template <class From>
inline void keep_row(const From* from, int64_t n, char* to, float* scale, Int8) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  constexpr int32_t kInfinite = 0x7f800000;
  IVec largest = {};  // as bits, which are in the order of the magnitudes; NaN above infinity
  for (int64_t d = 0; d < n; d += kLanes) {
    const IVec bits = (IVec)load_row(from + d) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
  if (most >= kInfinite) {
    // No integer is not finite: the scale says so, and whatever is computed from the row.
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(to, 0, n);
    return;
  }
  // Of a row of almost nothing the scale would be subnormal, too coarse for 127 steps.
  const float step = bits_to_float(most) / 127.0f;
  *scale = step >= std::numeric_limits<float>::min() ? step : 1.0f;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t d = 0; d < n; d += kLanes) {
    const Vec rounded = (load_row(from + d) / *scale + magic) - magic;
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, IVec), Bytes);
    std::memcpy(to + d, &bytes, sizeof(bytes));
  }
}

template <class From, class To>
void append_piece(const Host& h, const HostAppend& a, const HostPiece& p, float* scratch) {
  const From* k = static_cast<const From*>(a.k) + p.from * a.k_row_stride +
                  p.kv_head * a.k_head_stride;
  const From* v = static_cast<const From*>(a.v) + p.from * a.v_row_stride +
                  p.kv_head * a.v_head_stride;
  const int64_t size = h.head_size, bytes = size * sizeof(To);
  char* part = h.parts + a.layer * h.layer_bytes + p.page * h.part_bytes;
  const int64_t first = (p.kv_head << h.shift) + p.row;
  char* rows = part + first * 2 * bytes;
  float* scales = reinterpret_cast<float*>(part + h.scales_at) + 2 * first;
  for (int64_t n = 0; n < p.count; ++n) {
    float unused;
    const bool scaled = std::is_same<To, Int8>::value;
    keep_row(k + n * a.k_row_stride, size, rows + 2 * n * bytes, scaled ? scales + 2 * n : &unused,
             To());
    keep_row(v + n * a.v_row_stride, size, rows + (2 * n + 1) * bytes,
             scaled ? scales + 2 * n + 1 : &unused, To());
  }
  if (h.sampler == kExact) return;
  const Sketch s(h, a.layer, p.page * h.part_bytes, p.kv_head);
  float* x = scratch;  // [kHashRows, D] keys less their centre
  if (p.row == 0 && p.centre != nullptr) {
    std::memcpy(s.centre, p.centre, size * sizeof(float));
  } else if (p.row == 0) {
    std::memset(s.centre, 0, size * sizeof(float));
    for (int64_t n = 0; n < p.count; ++n) {
      for (int64_t d = 0; d < size; ++d) s.centre[d] += to_float(k[n * a.k_row_stride + d]);
    }
    for (int64_t d = 0; d < size; ++d) {
      s.centre[d] /= static_cast<float>(p.count);
      if (!(std::fabs(s.centre[d]) < kInf)) s.centre[d] = 0.0f;
    }
  }
  for (int64_t n = 0; n < p.count; n += kHashRows) {
    const int count = static_cast<int>(p.count - n < kHashRows ? p.count - n : kHashRows);
    for (int i = 0; i < count; ++i) {
      const From* key = k + (n + i) * a.k_row_stride;
      for (int64_t d = 0; d < size; ++d) x[i * size + d] = to_float(key[d]) - s.centre[d];
      sketch_enter(s, p.row + n + i, x + i * size, size);
    }
    if (h.sampler == kLsh) {
      hash_keys(h, x, count, scratch + kHashRows * size, s.codes, p.row + n);
    }
  }
}

// Calls with(type) for the storage type of an append's input.
template <class With>
inline void for_floats(int64_t dtype, const With& with) {
  switch (dtype) {
    case kFloat32: return with(float());
    case kBFloat16: return with(BFloat16());
    case kFloat16: return with(Float16());
  }
}

}  // namespace
}  // namespace vllm_sparse
