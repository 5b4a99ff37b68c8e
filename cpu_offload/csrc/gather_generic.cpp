#define VLLM_SPARSE_LANES 4
#define VLLM_SPARSE_KEYS 4
#define VLLM_SPARSE_VECS 2
#include "gather_isa.h"

namespace vllm_sparse {

const GatherKernels* gather_generic() {
  static constexpr GatherKernels kernels = make_gather_kernels("generic");
  return &kernels;
}

}  // namespace vllm_sparse
