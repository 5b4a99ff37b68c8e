// The kernels' own threads: sized and pinned by the caller, so they stay on the worker's cores.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace vllm_sparse {

// Sets the number of threads, the calling one included, and the CPUs that the others run on
// (thread i on cpus[i]; cpus may be null: not pinned). Existing threads end first.
void set_threads(int count, const int* cpus);

int num_threads();

// Runs task(index, scratch) for index 0 .. count - 1, the highest index first, and returns when
// all are done. Each thread gets its own scratch of `scratch_floats` floats, 64-byte aligned,
// kept for the next call. False when memory for it could not be had; nothing has run then.
bool parallel_for(int64_t count, size_t scratch_floats,
                  const std::function<void(int64_t, float*)>& task);

}  // namespace vllm_sparse
