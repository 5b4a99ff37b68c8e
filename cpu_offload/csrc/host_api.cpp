// Rows into a host store: the C interface that cpu_offload/host.py loads with ctypes.
#include <algorithm>
#include <new>
#include <vector>

#include "attention.h"
#include "gather.h"
#include "thread_pool.h"

#define VLLM_SPARSE_API extern "C" __attribute__((visibility("default")))

using namespace vllm_sparse;

// 0; 1: memory ran out; 2: the page lists were written over, and nothing is kept. Pages were given
// to the requests before.
VLLM_SPARSE_API int vllm_sparse_host_append(const Host* host, const HostAppend* append) {
  constexpr int64_t kFirm = 32;  // rows whose mean a page is centred by; fewer take the page before
  const Host& h = *host;
  try {
    const int64_t size = int64_t{1} << h.shift;
    std::vector<HostPiece> work;
    for (int64_t j = 0; j < append->count; ++j) {
      const int64_t* job = append->jobs + 4 * j;
      const int32_t* pages = h.table + job[0] * h.max_pages;
      for (int64_t done = 0; done < job[2];) {
        const int64_t row = job[1] + done, within = row & (size - 1);
        const int64_t count = std::min(size - within, job[2] - done);
        const int64_t page = page_of(h, pages, row >> h.shift);
        const int64_t before = row < size ? 0 : page_of(h, pages, (row >> h.shift) - 1);
        if (page < 0 || before < 0) return 2;
        for (int64_t head = 0; head < h.kv_heads; ++head) {
          const float* centre = nullptr;
          if (within == 0 && row > 0 && count < kFirm) {
            centre = reinterpret_cast<const float*>(
                h.parts + append->layer * h.layer_bytes +
                before * h.part_bytes + h.index_at + head * h.index_bytes);
          }
          work.push_back({page, head, within, count, job[3] + done, centre});
        }
        done += count;
      }
    }
    const GatherKernels* k = offload_kernels();
    // Pages that take over a centre come after those that they take it from.
    std::vector<HostPiece> firm, taking;
    for (const HostPiece& p : work) (p.centre != nullptr ? taking : firm).push_back(p);
    const auto run = [&](const std::vector<HostPiece>& pieces) {
      return parallel_for(pieces.size(), k->append_scratch(h), [&](int64_t i, float* scratch) {
        k->append(h, *append, pieces[i], scratch);
      });
    };
    return run(firm) && run(taking) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
