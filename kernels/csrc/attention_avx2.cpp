#define VLLM_SPARSE_LANES 8
#define VLLM_SPARSE_KEYS 6
#define VLLM_SPARSE_VECS 2
#include "attention_isa.h"

namespace vllm_sparse {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels("avx2");
  return &kernels;
}

}  // namespace vllm_sparse
