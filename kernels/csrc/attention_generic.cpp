#define VLLM_SPARSE_LANES 4
#define VLLM_SPARSE_KEYS 4
#define VLLM_SPARSE_VECS 2
#include "attention_isa.h"

namespace vllm_sparse {

const Kernels* generic_kernels() {
  static constexpr Kernels kernels = make_kernels("generic");
  return &kernels;
}

}  // namespace vllm_sparse
