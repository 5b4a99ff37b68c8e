// The C interface that kernels/cpu.py loads with ctypes. Arguments were checked there.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "cope_work.h"
#include "cpu_features.h"
#include "decode_work.h"
#include "heaviest.h"
#include "index_lists.h"
#include "last_rows.h"
#include "linear_work.h"
#include "pattern_search.h"
#include "thread_pool.h"

#define VLLM_SPARSE_API extern "C" __attribute__((visibility("default")))

namespace vllm_sparse {
namespace {

// The kernels that this CPU runs, the best first; ends with null.
const Kernels* const* available() {
  static const Kernels* found[6] = {};
  static const bool once = [] {
    int n = 0;
#if defined(__x86_64__)
    if (have_avx512_bf16() && have_amx()) found[n++] = amx_kernels();
    if (have_avx512_bf16()) found[n++] = avx512_bf16_kernels();
    if (have_avx512()) found[n++] = avx512_kernels();
    if (have_avx2()) found[n++] = avx2_kernels();
#endif
    found[n++] = generic_kernels();
    return true;
  }();
  (void)once;
  return found;
}

std::atomic<const Kernels*> g_kernels{nullptr};

const Kernels* kernels() {
  const Kernels* chosen = g_kernels.load();
  return chosen != nullptr ? chosen : available()[0];
}

// Runs a step that allocates for each head; 0 on success, 1 when memory ran out.
template <class Args, class Step>
int for_heads(const Args& args, int64_t heads, Step step) {
  std::atomic<bool> failed{false};
  const auto run = [&](int64_t head, float*) {
    try {
      step(args, head);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  return parallel_for(heads, 0, run) && !failed ? 0 : 1;
}

// Mean keys and values of the complete blocks of a step's sequences.
class MeanTables {
 public:
  // False when memory ran out.
  bool make(const Prefill& a, const Kernels* k) {
    for (int64_t s = 0; s < a.shape.num_seqs; ++s) {
      if (!add(a.kv, a, s, k, k_means) || !add(values_as_keys(a.kv), a, s, k, v_means)) {
        return false;
      }
    }
    return true;
  }

  std::vector<const float*> k_means, v_means;  // of each sequence

 private:
  static PagedKV values_as_keys(PagedKV kv) {
    kv.k = kv.v;
    kv.k_page_stride = kv.v_page_stride;
    kv.k_head_stride = kv.v_head_stride;
    kv.k_row_stride = kv.v_row_stride;
    return kv;
  }

  bool add(PagedKV kv, const Prefill& a, int64_t seq, const Kernels* k,
           std::vector<const float*>& means) {
    const int64_t blocks = a.seq_lens[seq] / kBlock, heads = a.shape.num_kv_heads;
    std::vector<int64_t> every_head(heads);
    for (int64_t h = 0; h < heads; ++h) every_head[h] = h;
    // Not a vector, which would be zeroed first.
    owned_.emplace_back(new float[heads * blocks * a.shape.head_size]);
    means.push_back(owned_.back().get());
    kv.block_table += seq * kv.table_stride;
    const BlockMeans args{kv, a.shape.dtype, a.shape.head_size, blocks * kBlock,
                          every_head.data(), heads, owned_.back().get()};
    const auto run = [&](int64_t i, float*) { k->block_means(args, i); };
    return parallel_for(heads * blocks, 0, run);
  }

  std::vector<std::unique_ptr<float[]>> owned_;
};


}  // namespace
}  // namespace vllm_sparse

using namespace vllm_sparse;

VLLM_SPARSE_API const char* vllm_sparse_isa() { return kernels()->name; }

// Chooses an instruction set by name, "" for the best one. 0 on success; for tests and benchmarks.
VLLM_SPARSE_API int vllm_sparse_set_isa(const char* name) {
  for (const Kernels* const* k = available(); *k != nullptr; ++k) {
    if (*name == '\0' || std::strcmp((*k)->name, name) == 0) {
      g_kernels.store(*k);
      return 0;
    }
  }
  return 1;
}

VLLM_SPARSE_API int vllm_sparse_set_threads(int count, const int* cpus) {
  try {
    set_threads(count, cpus);
    return 0;
  } catch (...) {  // no exception may cross into Python
    return 1;
  }
}

VLLM_SPARSE_API int vllm_sparse_num_threads() { return num_threads(); }

// 0 on success, 1 when memory ran out.
VLLM_SPARSE_API int vllm_sparse_prefill(const Prefill* args) {
  try {
    Prefill a = *args;
    const Kernels* k = kernels();
    MeanTables means;
    if (a.mean_correction && a.blocks != nullptr) {
      if (!means.make(a, k)) return 1;
      a.k_means = means.k_means.data();
      a.v_means = means.v_means.data();
    } else {
      a.k_means = a.v_means = nullptr;
    }
    std::vector<TileWork> work;
    const Shape& shape = a.shape;
    int64_t tiles = 0;
    for (int64_t s = 0; s < shape.num_seqs; ++s) {
      tiles += (a.query_start_loc[s + 1] - a.query_start_loc[s] + kTile - 1) / kTile;
    }
    // As many heads of a KV head together as leaves each thread about four pieces of work.
    const int64_t group = shape.num_heads / shape.num_kv_heads;
    int64_t together = group < kMaxHeads ? group : kMaxHeads;
    while (together > 1 && tiles * shape.num_heads / together < 4 * num_threads()) {
      together = (together + 1) / 2;
    }
    int64_t tile = 0;
    for (int64_t s = 0; s < shape.num_seqs; ++s) {
      const int64_t rows = a.query_start_loc[s + 1] - a.query_start_loc[s];
      for (int64_t t = 0; t * kTile < rows; ++t, ++tile) {
        for (int64_t h = 0; h < shape.num_heads;) {
          const int64_t left = group - h % group;
          const int64_t heads = left < together ? left : together;
          work.push_back({s, t, tile * shape.num_heads + h, h, static_cast<int>(heads)});
          h += heads;
        }
      }
    }
    const auto run = [&](int64_t i, float* scratch) { k->prefill_tile(a, work[i], scratch); };
    return parallel_for(work.size(), k->prefill_scratch(shape), run) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// 0 on success, 1 when memory ran out.
VLLM_SPARSE_API int vllm_sparse_cope(const Cope* args) {
  try {
    const Cope& a = *args;
    const Kernels* k = kernels();
    CopePieces pieces(a, num_threads());
    const auto tile = [&](int64_t i, float* scratch) { k->cope_tile(a, pieces.tiles[i], scratch); };
    if (!parallel_for(pieces.tiles.size(), k->cope_scratch(a), tile)) return 1;
    pieces.cut();
    const auto range = [&](int64_t i, float* scratch) {
      k->decode_split(pieces.decode(i), &pieces.ranges[i], 1, scratch);
    };
    if (!parallel_for(pieces.ranges.size(), k->decode_scratch(a.shape, 1), range)) return 1;
    pieces.join(k->decode_merge);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// A linear layer, and the packing of its weights. 0 on success, 1 when memory ran out.

VLLM_SPARSE_API int vllm_sparse_linear(const Linear* args) {
  try {
    return run_linear(*args, kernels()) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

VLLM_SPARSE_API int vllm_sparse_pack_linear(const LinearWeight* args) {
  return pack_linear(*args) ? 0 : 1;
}

// 0 on success, 1 when memory ran out, 2 where the shared keys are not this batch's.
VLLM_SPARSE_API int vllm_sparse_decode(const Decode* args) {
  try {
    const Decode& a = *args;
    if (!shared_keys_fit(a)) return 2;
    const Kernels* k = kernels();
    const Shape& shape = a.shape;
    int64_t keys = 0;
    for (int64_t s = 0; s < shape.num_seqs; ++s) keys += a.seq_lens[s];
    DecodeWork work(a, split_of(keys * shape.num_kv_heads, num_threads()));
    const auto run = [&](int64_t i, float* scratch) {
      k->decode_split(a, work.first(i), work.count(i), scratch);
    };
    if (!parallel_for(work.pieces(), k->decode_scratch(shape, work.together()), run)) return 1;
    for (int64_t s = 0; s < shape.num_seqs; ++s) {
      for (int64_t h = 0; h < shape.num_kv_heads; ++h) {
        const auto part = work.parts(s, h);
        k->decode_merge(a, s, h, part.out, part.lse, part.highest, part.count);
      }
    }
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// 0 on success, 1 when memory ran out.
VLLM_SPARSE_API int vllm_sparse_row_scores(const RowScores* args) {
  try {
    const RowScores& a = *args;
    const Kernels* k = kernels();
    const int64_t group = a.shape.num_heads / a.shape.num_kv_heads;
    // As many heads together as fill a tile, but a piece of work for each thread.
    int64_t together = kTile / lanes_of_rows(a.num_rows);
    while (together > 1 && a.num_wanted / together < num_threads()) together /= 2;
    std::vector<RowWork> work;
    for (int64_t h = 0; h < a.num_wanted;) {
      int heads = 1;
      while (heads < together && h + heads < a.num_wanted &&
             a.heads[h + heads] / group == a.heads[h] / group) {
        ++heads;
      }
      work.push_back({h, heads});
      h += heads;
    }
    const auto run = [&](int64_t i, float* scratch) { k->row_scores(a, work[i], scratch); };
    return parallel_for(work.size(), k->row_scores_scratch(a), run) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// The small steps of planning. 0 on success, 1 when memory ran out.

VLLM_SPARSE_API int vllm_sparse_block_means(const BlockMeans* args) {
  const Kernels* k = kernels();
  const int64_t blocks = (args->seq_len + kBlock - 1) / kBlock;
  const auto run = [&](int64_t i, float*) { k->block_means(*args, i); };
  return parallel_for(args->num_heads * blocks, 0, run) ? 0 : 1;
}

VLLM_SPARSE_API int vllm_sparse_tile_means(const TileMeans* args) {
  const Kernels* k = kernels();
  const auto run = [&](int64_t tile, float*) { k->tile_means(*args, tile); };
  return parallel_for((args->num_rows + kTile - 1) / kTile, 0, run) ? 0 : 1;
}

VLLM_SPARSE_API int vllm_sparse_heaviest(const Heaviest* args) {
  const auto run = [&](int64_t head, float*) { heaviest(*args, head); };
  return parallel_for(args->heads, 0, run) ? 0 : 1;
}

VLLM_SPARSE_API int vllm_sparse_index_lists(const IndexLists* args) {
  const auto run = [&](int64_t tile, float*) { index_lists(*args, tile); };
  return parallel_for(args->tiles, 0, run) ? 0 : 1;
}

VLLM_SPARSE_API int vllm_sparse_cheapest_window(const WindowSearch* args) {
  return for_heads(*args, args->mass.heads, search_window);
}

VLLM_SPARSE_API int vllm_sparse_cheapest_columns(const ColumnSearch* args) {
  return for_heads(*args, args->mass.heads, search_columns);
}

VLLM_SPARSE_API int vllm_sparse_cheapest_threshold(const ThresholdSearch* args) {
  return for_heads(*args, args->mass.heads, search_threshold);
}

VLLM_SPARSE_API int vllm_sparse_cheapest_union(const UnionSearch* args) {
  return for_heads(*args, args->heads, search_union);
}

VLLM_SPARSE_API int vllm_sparse_least_keys(const LeastKeys* args) {
  return for_heads(*args, args->mass.heads, count_least_keys);
}

VLLM_SPARSE_API int vllm_sparse_sort_columns(const SortColumns* args) {
  return for_heads(*args, args->heads, sort_columns);
}
