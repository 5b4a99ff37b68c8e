// Sums of products of bytes, on CPUs that have them (AVX512_VNNI).
#pragma once

#include "vec.h"

namespace vllm_sparse {
namespace {

#if defined(__AVX512VNNI__)

// acc + the products of the four bytes of x, unsigned, and of y, signed, in each lane.
//
// Sums are to be kept as IVec: as __m512i, whose lanes have 64 bits, GCC 12 has each in two
// registers and copies it to and fro with every product.
inline IVec add_byte_products(IVec acc, __m512i x, __m512i y) {
  return (IVec)_mm512_dpbusd_epi32((__m512i)acc, x, y);
}

#endif

}  // namespace
}  // namespace vllm_sparse
