#define VLLM_SPARSE_LANES 16
#define VLLM_SPARSE_KEYS 6
#define VLLM_SPARSE_VECS 4
#include "gather_isa.h"

namespace vllm_sparse {

const GatherKernels* gather_avx512_bf16() {
  static constexpr GatherKernels kernels = make_gather_kernels("avx512_bf16");
  return &kernels;
}

}  // namespace vllm_sparse
