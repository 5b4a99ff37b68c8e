// The C interface that cpu_offload/native.py loads with ctypes. Arguments were checked there.
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "attention.h"
#include "cpu_features.h"
#include "gather.h"
#include "lsh_tables.h"
#include "thread_pool.h"

#define VLLM_SPARSE_API extern "C" __attribute__((visibility("default")))

namespace vllm_sparse {
namespace {

// The kernels that this CPU runs, the best first; ends with null.
const GatherKernels* const* available() {
  static const GatherKernels* found[5] = {};
  static const bool once = [] {
    int n = 0;
#if defined(__x86_64__)
    if (have_avx512_bf16()) found[n++] = gather_avx512_bf16();
    if (have_avx512()) found[n++] = gather_avx512();
    if (have_avx2()) found[n++] = gather_avx2();
#endif
    found[n++] = gather_generic();
    return true;
  }();
  (void)once;
  return found;
}

std::atomic<const GatherKernels*> g_kernels{nullptr};

const GatherKernels* kernels() {
  const GatherKernels* chosen = g_kernels.load();
  return chosen != nullptr ? chosen : available()[0];
}

}  // namespace

const GatherKernels* offload_kernels() { return kernels(); }

namespace {

constexpr int64_t kMinSplit = 512;  // rows; below this a thread's start costs more than it saves
constexpr int kPieces = 4;  // of work a thread, so that the last to finish is not far behind

bool bf16_queries(const GatherCall& call) {
  uint32_t low = 0, bits;
  for (int64_t i = 0; i < call.num_items * call.group * call.head_size; ++i) {
    std::memcpy(&bits, call.q + i, sizeof(bits));
    low |= bits & 0xffffu;
  }
  return low == 0;
}

std::vector<GatherItem> gather_items(const GatherCall& call) {
  std::vector<GatherItem> items(call.num_items);
  for (int64_t i = 0; i < call.num_items; ++i) {
    GatherItem& item = items[i];
    const int64_t head = i / call.each % call.kv_heads;
    item.view = call.view;
    item.view.rows += head * call.head_bytes;
    if (item.view.scales != nullptr) item.view.scales += head * call.head_scale_bytes;
    item.q = call.q + i * call.group * call.head_size;
    item.rows = call.rows != nullptr ? call.rows + i * call.rows_stride : nullptr;
    item.log_prob = call.log_prob != nullptr ? call.log_prob + i * call.log_prob_stride : nullptr;
    item.count = call.counts[i];
    item.out = call.out + i * call.group * call.head_size;
    item.lse = call.lse + i * call.group;
  }
  return items;
}

// Joins the partial results [parts, G, D] and [parts, G] of one item.
void merge_parts(const Gather& a, const GatherItem& item, const float* out, const float* lse,
                 int64_t parts) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (int64_t g = 0; g < a.group; ++g) {
    float top = -kInf, sum = 0.0f;
    for (int64_t p = 0; p < parts; ++p) top = std::fmax(top, lse[p * a.group + g]);
    const float base = top == -kInf ? 0.0f : top;
    float* to = item.out + g * a.head_size;
    std::memset(to, 0, a.head_size * sizeof(float));
    for (int64_t p = 0; p < parts; ++p) {
      const float weight = std::exp(lse[p * a.group + g] - base);
      const float* from = out + (p * a.group + g) * a.head_size;
      for (int64_t d = 0; d < a.head_size; ++d) to[d] += weight * from[d];
      sum += weight;
    }
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    for (int64_t d = 0; d < a.head_size; ++d) to[d] *= inverse;
    item.lse[g] = sum > 0.0f ? base + std::log(sum) : -kInf;
  }
}

// Runs `work`, and says whether memory sufficed; no exception may cross into Python.
template <class Work>
int guarded(const Work& work) {
  try {
    return work() ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
}  // namespace vllm_sparse

using namespace vllm_sparse;

VLLM_SPARSE_API const char* vllm_sparse_offload_isa() { return kernels()->name; }

// Chooses an instruction set by name, "" for the best one. 0 on success; for tests and benchmarks.
VLLM_SPARSE_API int vllm_sparse_offload_set_isa(const char* name) {
  for (const GatherKernels* const* k = available(); *k != nullptr; ++k) {
    if (*name == '\0' || std::strcmp((*k)->name, name) == 0) {
      g_kernels.store(*k);
      return 0;
    }
  }
  return 1;
}

// These return 0 on success, 1 when memory ran out.

// 2 where a row is none of its context: it was not read, and the results mean nothing.
VLLM_SPARSE_API int vllm_sparse_gather(const GatherCall* args) {
  std::atomic<bool> inside{true};
  const int code = guarded([&] {
    const GatherCall& call = *args;
    const Gather a{call.dtype, call.head_size, call.group, bf16_queries(call), call.scale};
    const GatherKernels* k = kernels();
    const std::vector<GatherItem> items = gather_items(call);
    const int64_t threads = num_threads();
    int64_t rows = 0;
    for (const GatherItem& item : items) rows += item.count;
    int64_t split = threads == 1 ? INT64_MAX / 2 : rows / (kPieces * threads) + 1;
    if (split < kMinSplit) split = kMinSplit;
    std::vector<GatherSplit> work;
    std::vector<int64_t> first_part;  // of each item
    for (const GatherItem& item : items) {
      first_part.push_back(work.size());
      for (int64_t n = 0; n < item.count; n += split) {
        const int64_t last = item.count - n < split ? item.count : n + split;
        work.push_back({&item, n, last, nullptr, nullptr});
      }
    }
    first_part.push_back(work.size());
    std::vector<float> out(work.size() * a.group * a.head_size);
    std::vector<float> lse(work.size() * a.group);
    for (size_t i = 0; i < work.size(); ++i) {
      work[i].out = out.data() + i * a.group * a.head_size;
      work[i].lse = lse.data() + i * a.group;
    }
    const auto run = [&](int64_t i, float* scratch) {
      if (inside && !k->gather(a, work[i], scratch)) inside = false;
    };
    if (!parallel_for(work.size(), k->gather_scratch(a), run)) return false;
    for (size_t i = 0; i < items.size() && inside; ++i) {
      const int64_t part = first_part[i];
      merge_parts(a, items[i], out.data() + part * a.group * a.head_size,
                  lse.data() + part * a.group, first_part[i + 1] - part);
    }
    return true;
  });
  return inside ? code : 2;
}

VLLM_SPARSE_API int vllm_sparse_lsh_query(const Lsh* args) {
  return guarded([&] {
    const GatherKernels* k = kernels();
    const auto run = [&](int64_t i, float* scratch) { k->lsh(*args, args->items[i], scratch); };
    return parallel_for(args->num_items, k->lsh_scratch(*args), run);
  });
}

VLLM_SPARSE_API int vllm_sparse_lsh_enter(const LshTables* args) {
  return guarded([&] {
    const auto run = [&](int64_t i, float* scratch) {
      lsh_enter(*args, i, reinterpret_cast<uint32_t*>(scratch));
    };
    return parallel_for(args->tables, int64_t{1} << args->bits, run);
  });
}

VLLM_SPARSE_API int vllm_sparse_scores(const Score* args) {
  return guarded([&] {
    constexpr int64_t kPiece = 4096;  // rows
    const GatherKernels* k = kernels();
    struct Piece {
      const ScoreItem* item;
      int64_t first, last;
    };
    std::vector<Piece> work;
    for (int64_t i = 0; i < args->num_items; ++i) {
      const int64_t rows = args->items[i].view.length;
      for (int64_t n = 0; n < rows; n += kPiece) {
        work.push_back({args->items + i, n, rows - n < kPiece ? rows : n + kPiece});
      }
    }
    const auto run = [&](int64_t i, float* scratch) {
      k->score(*args, *work[i].item, work[i].first, work[i].last, scratch);
    };
    return parallel_for(work.size(), k->score_scratch(*args), run);
  });
}

VLLM_SPARSE_API int vllm_sparse_unpack(const Unpack* args) {
  return guarded([&] {
    constexpr int64_t kPiece = 512;  // rows: 128 KiB of int8 at head size 128
    const GatherKernels* k = kernels();
    const int64_t pieces = (args->rows + kPiece - 1) / kPiece;
    const auto run = [&](int64_t i, float*) {
      const int64_t first = i % pieces * kPiece, left = args->rows - first;
      k->unpack(*args, i / pieces, first, first + (left < kPiece ? left : kPiece));
    };
    return parallel_for(args->num_pages * pieces, 1, run);
  });
}

// Reads `bytes` bytes, a contiguous part by each thread: what memory gives to who only reads.
VLLM_SPARSE_API int vllm_sparse_read(const char* from, int64_t bytes, float* sum) {
  return guarded([&] {
    const GatherKernels* k = kernels();
    const int64_t parts = num_threads();
    std::vector<float> sums(parts);
    const int64_t part = bytes / parts / 4096 * 4096;
    const auto run = [&](int64_t i, float*) { sums[i] = k->read(from + i * part, part); };
    if (!parallel_for(parts, 1, run)) return false;
    *sum = 0.0f;
    for (float x : sums) *sum += x;
    return true;
  });
}
