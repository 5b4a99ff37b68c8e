#define VLLM_SPARSE_LANES 8
#define VLLM_SPARSE_KEYS 6
#define VLLM_SPARSE_VECS 2
#include "gather_isa.h"

namespace vllm_sparse {

const GatherKernels* gather_avx2() {
  static constexpr GatherKernels kernels = make_gather_kernels("avx2");
  return &kernels;
}

}  // namespace vllm_sparse
