// Memory of a thread that is kept from call to call, and grows.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace vllm_sparse {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // So many floats, 64-byte aligned; null when memory for them could not be had.
  float* at_least(size_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = 0;
      const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      if (data_ != nullptr) size_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace vllm_sparse
