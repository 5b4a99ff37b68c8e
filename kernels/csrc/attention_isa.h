// The kernels of one instruction set, for the file that includes this to hand out.
//
// Everything has internal linkage: the linker must never share code between instruction sets.
// The including file defines VLLM_SPARSE_LANES, VLLM_SPARSE_KEYS and VLLM_SPARSE_VECS: the score
// kernel keeps KEYS x VECS accumulators in registers.
#pragma once

#include "block_means.h"
#include "cope_tile.h"
#include "decode_split.h"
#include "linear_tile.h"
#include "prefill_tile.h"
#include "row_scores.h"

namespace vllm_sparse {
namespace {

size_t prefill_scratch(const Shape& shape) {
  return SharedBlock::floats(shape.head_size) + kMaxHeads * TileHead::floats(shape.head_size);
}

size_t decode_scratch(const Shape& shape, int64_t together) {
  return together * SplitScratch::floats(shape);
}

void prefill_tile_any(const Prefill& a, const TileWork& w, float* scratch) {
  switch (a.shape.dtype) {
    case kFloat32: return prefill_tile<float>(a, w, scratch);
    case kBFloat16: return prefill_tile<BFloat16>(a, w, scratch);
    case kFloat16: return prefill_tile<Float16>(a, w, scratch);
  }
}

void decode_split_any(const Decode& a, const SplitWork* w, int64_t count, float* scratch) {
  switch (a.shape.dtype) {
    case kFloat32: return decode_split<float>(a, w, count, scratch);
    case kBFloat16: return decode_split<BFloat16>(a, w, count, scratch);
    case kFloat16: return decode_split<Float16>(a, w, count, scratch);
  }
}

void decode_merge_any(const Decode& a, int64_t seq, int64_t kv_head, float* out, const float* lse,
                      const float* highest, int64_t parts) {
  switch (a.shape.dtype) {
    case kFloat32: return decode_merge<float>(a, seq, kv_head, out, lse, highest, parts);
    case kBFloat16: return decode_merge<BFloat16>(a, seq, kv_head, out, lse, highest, parts);
    case kFloat16: return decode_merge<Float16>(a, seq, kv_head, out, lse, highest, parts);
  }
}

size_t row_scores_scratch(const RowScores& a) { return RowScratch::floats(a); }

void row_scores_any(const RowScores& a, const RowWork& w, float* scratch) {
  switch (a.shape.dtype) {
    case kFloat32: return row_scores<float>(a, w, scratch);
    case kBFloat16: return row_scores<BFloat16>(a, w, scratch);
    case kFloat16: return row_scores<Float16>(a, w, scratch);
  }
}

void block_means_any(const BlockMeans& a, int64_t index) {
  switch (a.dtype) {
    case kFloat32: return block_means<float>(a, index);
    case kBFloat16: return block_means<BFloat16>(a, index);
    case kFloat16: return block_means<Float16>(a, index);
  }
}

void tile_means_any(const TileMeans& a, int64_t tile) {
  switch (a.dtype) {
    case kFloat32: return tile_means<float>(a, tile);
    case kBFloat16: return tile_means<BFloat16>(a, tile);
    case kFloat16: return tile_means<Float16>(a, tile);
  }
}

size_t cope_scratch(const Cope& a) { return CopeTile::floats(a); }

void cope_tile_any(const Cope& a, const CopeWork& w, float* scratch) {
  switch (a.shape.dtype) {
    case kFloat32: return cope_tile<float>(a, w, scratch);
    case kBFloat16: return cope_tile<BFloat16>(a, w, scratch);
    case kFloat16: return cope_tile<Float16>(a, w, scratch);
  }
}

size_t linear_row_bytes_any(const Linear& a) {
  switch (a.dtype) {
    case kFloat32: return linear_row_bytes<float>(a);
    case kBFloat16: return linear_row_bytes<BFloat16>(a);
    case kFloat16: return linear_row_bytes<Float16>(a);
  }
  return 0;
}

void linear_row_any(const Linear& a, int64_t row, void* to) {
  switch (a.dtype) {
    case kFloat32: return linear_row<float>(a, row, to);
    case kBFloat16: return linear_row<BFloat16>(a, row, to);
    case kFloat16: return linear_row<Float16>(a, row, to);
  }
}

void linear_panel_any(const Linear& a, int64_t panel, int64_t first_row, const void* rows,
                      float* scratch) {
  switch (a.dtype) {
    case kFloat32: return linear_panel<float>(a, panel, first_row, rows, scratch);
    case kBFloat16: return linear_panel<BFloat16>(a, panel, first_row, rows, scratch);
    case kFloat16: return linear_panel<Float16>(a, panel, first_row, rows, scratch);
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name,
          prefill_scratch,
          prefill_tile_any,
          decode_scratch,
          decode_split_any,
          decode_merge_any,
          row_scores_scratch,
          row_scores_any,
          block_means_any,
          tile_means_any,
          cope_scratch,
          cope_tile_any,
          linear_row_bytes_any,
          linear_row_any,
          linear_panel_any};
}

}  // namespace
}  // namespace vllm_sparse
