// Packing of a linear layer's weights, and its work in pieces for all threads.
#pragma once

#include <cstring>

#include "attention.h"
#include "scratch.h"
#include "thread_pool.h"

namespace vllm_sparse {

inline int64_t bytes_of(int64_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Brings the rows of a panel into the order of attention.h, zeros beyond the last output and input.
inline void pack_panel(const LinearWeight& a, int64_t panel) {
  const int64_t item = bytes_of(a.dtype), row_bytes = a.num_inputs * item;
  const int64_t steps = steps_of(a.num_inputs, item), strips = strips_of(a.num_outputs, panel);
  char* to = static_cast<char*>(a.packed) + panel * kPanel * steps * kStepBytes;
  for (int64_t c = 0; c < steps; c += kChunk) {
    for (int64_t j = 0; j < strips; ++j) {
      for (int64_t s = c; s < steps && s < c + kChunk; ++s) {
        for (int64_t n = 0; n < kStripRows; ++n, to += kStepBytes) {
          const int64_t row = panel * kPanel + j * kStripRows + n;
          const int64_t beyond = row_bytes - s * kStepBytes;
          const int64_t count = row >= a.num_outputs ? 0 : beyond < kStepBytes ? beyond : kStepBytes;
          const char* from = static_cast<const char*>(a.weight) +
                             (row * a.row_stride * item + s * kStepBytes);
          if (count > 0) std::memcpy(to, from, count);
          std::memset(to + count, 0, kStepBytes - count);
        }
      }
    }
  }
}

inline bool pack_linear(const LinearWeight& a) {
  return parallel_for((a.num_outputs + kPanel - 1) / kPanel, 0,
                      [&](int64_t panel, float*) { pack_panel(a, panel); });
}

// Rows that are copied at once: 15 MB of 14336 inputs, in fp32.
constexpr int64_t kRowsTogether = 4 * kRowGroup;

// False when memory ran out.
inline bool run_linear(const Linear& a, const Kernels* k) {
  thread_local Scratch kept;  // the copies of inputs, for the next layer as well
  const size_t row_bytes = k->linear_row_bytes(a);
  const int64_t most = a.num_rows < kRowsTogether ? a.num_rows : kRowsTogether;
  char* rows = reinterpret_cast<char*>(kept.at_least(most * row_bytes / sizeof(float)));
  if (rows == nullptr && most > 0) return false;
  const int64_t panels = (a.num_outputs + kPanel - 1) / kPanel;
  for (int64_t first = 0; first < a.num_rows; first += kRowsTogether) {
    const int64_t left = a.num_rows - first, count = left < kRowsTogether ? left : kRowsTogether;
    const auto copy = [&](int64_t row, float*) {
      k->linear_row(a, first + row, rows + row * row_bytes);
    };
    if (count == 1) {
      copy(0, nullptr);  // what waking threads would cost is more
    } else if (!parallel_for(count, 0, copy)) {
      return false;
    }
    const int64_t groups = (count + kRowGroup - 1) / kRowGroup;
    const auto multiply = [&](int64_t i, float* scratch) {
      const int64_t piece = groups * panels - 1 - i;  // upwards, as the next weights are fetched
      const int64_t row = piece % groups * kRowGroup;
      k->linear_panel(a, piece / groups, first + row, rows + row * row_bytes, scratch);
    };
    if (!parallel_for(groups * panels, kRowGroup * kPanel, multiply)) return false;
  }
  return true;
}

}  // namespace vllm_sparse
