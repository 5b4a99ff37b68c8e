// The kernels of one instruction set, for the file that includes this to hand out.
//
// Everything has internal linkage: the linker must never share code between instruction sets.
// The including file defines what kernels/csrc/attention_isa.h asks for.
#pragma once

#include "gather_split.h"
#include "lsh_query.h"
#include "unpack.h"
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "gather_bf16.h"
#include "gather_int8.h"
#endif

namespace vllm_sparse {
namespace {

// Calls with(row type) for the type that `dtype` names.
template <class With>
inline void for_rows(int64_t dtype, const With& with) {
  switch (dtype) {
    case kFloat32: return with(float());
    case kBFloat16: return with(BFloat16());
    case kFloat16: return with(Float16());
    case kInt8: return with(Int8());
  }
}

size_t gather_scratch(const Gather& a) {
  size_t floats = gather_floats<Widened<float>>(a);
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  const size_t other[] = {gather_floats<PairedBFloat16>(a), gather_floats<SplitInt8>(a)};
  for (size_t x : other) floats = x > floats ? x : floats;
#endif
  return floats;
}

bool gather_any(const Gather& a, const GatherSplit& w, float* scratch) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  if (a.dtype == kBFloat16 && a.bf16_queries) return gather_split<PairedBFloat16>(a, w, scratch);
  if (a.dtype == kInt8) return gather_split<SplitInt8>(a, w, scratch);
#endif
  bool inside = true;
  for_rows(a.dtype, [&](auto row) {
    inside = gather_split<Widened<decltype(row)>>(a, w, scratch);
  });
  return inside;
}

size_t lsh_scratch(const Lsh& a) { return LshScratch::floats(a); }

void lsh_any(const Lsh& a, LshItem& item, float* scratch) {
  for_rows(a.dtype, [&](auto row) { lsh_query<decltype(row)>(a, item, scratch); });
}

size_t score_scratch(const Score& a) { return a.group * kBlock; }

void score_any(const Score& a, const ScoreItem& item, int64_t first, int64_t last,
               float* scratch) {
  for_rows(a.dtype, [&](auto row) {
    using T = decltype(row);
    const int group = static_cast<int>(a.group);
    Chunk<T> chunk;
    for (int64_t n = first; n < last; n += kBlock) {
      chunk.find(item.view, nullptr, n, last);
      for_heads(group, [&](int g, auto heads) {
        decode_score<heads>(item.q + g * a.head_size, chunk.keys, chunk.count, a.head_size,
                            scratch + g * kBlock, [](int) {});
      });
      for (int i = 0; i < chunk.count; ++i) {
        float factor = a.scale;
        if (std::is_same<T, Int8>::value) factor *= row_scales(item.view, chunk.rows[i])[0];
        for (int g = 0; g < group; ++g) {
          item.scores[g * item.view.length + n + i] = scratch[g * kBlock + i] * factor;
        }
      }
    }
  });
}

float read_memory(const char* from, int64_t bytes) {
  constexpr int64_t kStep = 8 * sizeof(Vec);
  const float* p = reinterpret_cast<const float*>(from);
  Vec acc[8] = {};
  for (int64_t i = 0; i + kStep <= bytes; i += kStep, p += 8 * kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) acc[j] += load(p + j * kLanes);
  }
  for (int j = 1; j < 8; ++j) acc[0] += acc[j];
  return horizontal_sum(acc[0]);
}

}  // namespace
}  // namespace vllm_sparse

#include "host_attend.h"

namespace vllm_sparse {
namespace {

void unpack_any(const Unpack& a, int64_t page, int64_t first, int64_t last) {
  for_floats(a.dtype, [&](auto to) { unpack_rows<decltype(to)>(a, page, first, last); });
}

constexpr GatherKernels make_gather_kernels(const char* name) {
  return {name,      gather_scratch, gather_any,     lsh_scratch, lsh_any,            score_scratch,
          score_any, read_memory,    attend_scratch, attend_any,  append_scratch_any, append_any,
          unpack_any};
}

}  // namespace
}  // namespace vllm_sparse
