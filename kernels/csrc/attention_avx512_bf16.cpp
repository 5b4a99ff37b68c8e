#define VLLM_SPARSE_LANES 16
#define VLLM_SPARSE_KEYS 6
#define VLLM_SPARSE_VECS 4
#include "cope_tile.h"
#include "decode_split.h"
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

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = *avx512_kernels();
    k.name = "avx512_bf16";
    k.prefill_tile = tile;
    k.decode_split = split;
    k.row_scores = rows;
    k.cope_tile = cope;
    return k;
  }();
  return &kernels;
}

}  // namespace vllm_sparse
