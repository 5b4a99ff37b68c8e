// What the CPU that runs this can do, as far as kernels are chosen by it.
#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vllm_sparse {
#if defined(__x86_64__)

inline bool have_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

inline bool have_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Products of pairs of bfloat16 numbers, and of bytes.
inline bool have_avx512_bf16() {
  __builtin_cpu_init();
  return have_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}

// Tiles must be asked for, once a process: Linux saves their 8 KiB only for who uses them.
inline bool have_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles_and_bf16 = (d >> 24 & 1) && (d >> 22 & 1);
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return tiles_and_bf16 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif
}  // namespace vllm_sparse
