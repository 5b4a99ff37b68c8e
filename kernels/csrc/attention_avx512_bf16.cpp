#define VLLM_SPARSE_LANES 16
#define VLLM_SPARSE_KEYS 6
#define VLLM_SPARSE_VECS 4
#include "cope_tile.h"
#include "decode_split.h"
#include "linear_tile.h"
#include "prefill_tile.h"
#include "row_scores.h"

namespace vllm_sparse {
namespace {

// In all else the AVX-512 kernels, which every CPU with products of pairs has.
void tile(const Prefill& a, const TileWork& w, float* scratch) {
  if (a.shape.dtype == kBFloat16) return prefill_tile<BFloat16>(a, w, scratch);
  avx512_kernels()->prefill_tile(a, w, scratch);
}

void split(const Decode& a, const SplitWork* w, int64_t count, float* scratch) {
  if (a.shape.dtype == kBFloat16) return decode_split<BFloat16>(a, w, count, scratch);
  avx512_kernels()->decode_split(a, w, count, scratch);
}

void rows(const RowScores& a, const RowWork& w, float* scratch) {
  if (a.shape.dtype == kBFloat16) return row_scores<BFloat16>(a, w, scratch);
  avx512_kernels()->row_scores(a, w, scratch);
}

void cope(const Cope& a, const CopeWork& w, float* scratch) {
  if (a.shape.dtype == kBFloat16) return cope_tile<BFloat16>(a, w, scratch);
  avx512_kernels()->cope_tile(a, w, scratch);
}

size_t row_bytes(const Linear& a) {
  return a.dtype == kBFloat16 ? linear_row_bytes<BFloat16>(a)
                              : avx512_kernels()->linear_row_bytes(a);
}

void row(const Linear& a, int64_t index, void* to) {
  if (a.dtype == kBFloat16) return linear_row<BFloat16>(a, index, to);
  avx512_kernels()->linear_row(a, index, to);
}

void panel(const Linear& a, int64_t index, int64_t first_row, const void* rows, float* scratch) {
  if (a.dtype == kBFloat16) return linear_panel<BFloat16>(a, index, first_row, rows, scratch);
  avx512_kernels()->linear_panel(a, index, first_row, rows, scratch);
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = *avx512_kernels();
    k.name = "avx512_bf16";
    k.prefill_tile = tile;
    k.decode_split = split;
    k.row_scores = rows;
    k.cope_tile = cope;
    k.linear_row_bytes = row_bytes;
    k.linear_row = row;
    k.linear_panel = panel;
    return k;
  }();
  return &kernels;
}

}  // namespace vllm_sparse
