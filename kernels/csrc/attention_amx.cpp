#define VLLM_SPARSE_LANES 16
#define VLLM_SPARSE_KEYS 6
#define VLLM_SPARSE_VECS 4
#include "prefill_amx.h"

namespace vllm_sparse {
namespace {

// In all else the kernels on pairs of bfloat16, which every CPU with tiles has.
bool fits(const Shape& shape) {
  return shape.dtype == kBFloat16 && shape.head_size % kAmxKeys == 0;
}

size_t scratch(const Shape& shape) {
  return fits(shape) ? prefill_scratch_amx(shape) : avx512_bf16_kernels()->prefill_scratch(shape);
}

void tile(const Prefill& a, const TileWork& w, float* scratch) {
  fits(a.shape) ? prefill_tile_amx(a, w, scratch) : avx512_bf16_kernels()->prefill_tile(a, w, scratch);
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = *avx512_bf16_kernels();
    k.name = "amx";
    k.prefill_scratch = scratch;
    k.prefill_tile = tile;
    return k;
  }();
  return &kernels;
}

}  // namespace vllm_sparse
