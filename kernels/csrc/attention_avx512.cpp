#define VLLM_SPARSE_LANES 16
#define VLLM_SPARSE_KEYS 6
#define VLLM_SPARSE_VECS 4
#include "attention_isa.h"

namespace vllm_sparse {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512");
  return &kernels;
}

}  // namespace vllm_sparse
