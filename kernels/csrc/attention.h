// What the C interface hands to the kernels. Mirrored field by field in kernels/cpu.py,
// kernels/row_scoring.py, kernels/plan_steps.py, kernels/cope.py and kernels/linear.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_sparse {

constexpr int kTile = 64;   // query rows of a tile
constexpr int kBlock = 64;  // keys of a block

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Softmax : int64_t { kOnline = 0, kLazy = 1, kUnified = 2 };

// Paged keys and values of one layer. Strides count elements, so any layout vLLM chooses works.
struct PagedKV {
  const void* k;
  const void* v;
  int64_t k_page_stride, k_head_stride, k_row_stride;
  int64_t v_page_stride, v_head_stride, v_row_stride;
  const int32_t* block_table;  // [num_seqs, table_stride]
  int64_t table_stride;
  int64_t page_size;
  int64_t num_pages;
};

struct Shape {
  int64_t dtype;
  int64_t num_seqs, num_heads, num_kv_heads, head_size;
  float scale;
};

struct Prefill {
  Shape shape;
  PagedKV kv;
  const void* q;
  int64_t q_row_stride, q_head_stride;
  void* out;
  int64_t out_row_stride, out_head_stride;
  float* lse;  // [T, H], contiguous
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  // All null for dense attention.
  const int32_t* block_offsets;
  const int32_t* blocks;
  const int32_t* column_offsets;
  const int32_t* columns;
  int64_t mean_correction;  // whether blocks that are left out take part by their means
  // [S], each [Hkv, complete blocks of the sequence, D]; null without mean correction. They are
  // made within the call: what the caller sets is not read.
  const float* const* k_means;
  const float* const* v_means;
};

struct Decode {
  Shape shape;
  PagedKV kv;
  const void* q;
  int64_t q_row_stride, q_head_stride;
  void* out;
  int64_t out_row_stride, out_head_stride;
  float* lse;  // [S, H], contiguous
  const int32_t* seq_lens;
  int64_t softmax;    // of enum Softmax
  const float* phi;   // [H], or null where softmax is not kUnified
  int64_t* flagged;   // rows that were computed again are added to it, or null
  // Which first keys some sequences read together (kernels/shared_prefix.py); num_tiles 0: none.
  int64_t num_tiles, most_members;
  const int32_t* shared_keys;  // [S]
  const int32_t* tile_keys;    // [Z]
  const int32_t* members;      // [Z, most_members], -1 after the last
};

// Attention with contextual positions (kernels/cope_reference.py).
struct Cope {
  Shape shape;
  PagedKV kv;
  const void* q;
  int64_t q_row_stride, q_head_stride;
  void* out;
  int64_t out_row_stride, out_head_stride;
  float* lse;  // [T, H], contiguous
  const int32_t* query_start_loc;
  const int32_t* seq_lens;
  const void* pos_emb;  // [num_positions, D]
  int64_t pos_emb_stride, num_positions;
};

// Exact attention of up to 64 rows of one sequence: how much of it each block of keys gets, and
// which single keys get most.
struct RowScores {
  Shape shape;  // one sequence; num_heads as q has them
  PagedKV kv;   // v is not read
  const void* q;
  int64_t q_row_stride, q_head_stride;
  const int64_t* positions;  // [R] the last key that each row sees; negative: none
  const int64_t* base_from;  // [R] first block of each row's base, or null: no base
  const int64_t* heads;      // [h] query heads; those of one KV head stand together
  int64_t num_rows, num_wanted, seq_len, num_columns;
  int64_t by_heaviest;  // columns are ranked by their heaviest row, else by all rows but that one
  float* blocks;        // [h, R, nb]
  float* squares;       // [h, R, nb], or null
  int64_t* columns;     // [h, M]
  float* column_mass;   // [h, R, M]
};

// Some of the wanted heads, all of one KV head: their rows fill the lanes of a tile.
struct RowWork {
  int64_t first;  // among the wanted heads
  int heads;
};

// Mean key of each block of one sequence.
struct BlockMeans {
  PagedKV kv;  // v is not read
  int64_t dtype, head_size, seq_len;
  const int64_t* heads;  // [h] KV heads
  int64_t num_heads;
  float* means;  // [h, nb, D]
};

// Mean query of each tile of a chunk.
struct TileMeans {
  const void* q;
  int64_t q_row_stride, q_head_stride;
  int64_t dtype, head_size, num_rows;
  const int64_t* heads;  // [h] query heads
  int64_t num_heads;
  float* means;  // [h, T, D]
};

// Lanes of a tile that `rows` rows of a head take: full vectors, or a power of two of lanes.
inline int lanes_of_rows(int64_t rows) {
  if (rows > 16) return static_cast<int>((rows + 15) / 16 * 16);
  int lanes = 1;
  while (lanes < rows) lanes *= 2;
  return lanes;
}

constexpr int kMaxHeads = 8;  // heads of a TileWork; their tiles stay in the second-level cache

// One query tile of some query heads of one KV head: the unit of work of prefill. The heads are
// taken together because they share the keys and values they read.
struct TileWork {
  int64_t seq, tile_in_seq;
  int64_t list_row;  // of the first head, in the lists of blocks and columns
  int64_t head;      // the first head
  int heads;         // 1 .. kMaxHeads
};

// What a tile makes of a sequence's newest keys: before `first_key` all of its rows have reached
// the last position, which adds the same to all that is left. `rows` of them are the tile's.
struct CopePart {
  float* out;    // [rows, D]
  float* lse;    // [rows]
  float* added;  // [rows]
  int64_t first_key;
};

// Some query rows of a sequence for some heads of one KV head, heads x rows up to 64: the unit of
// work of attention with contextual positions.
struct CopeWork {
  int64_t seq, first_row;  // first_row counts from the sequence's first query
  int rows;
  int64_t head;  // the first head
  int heads;
  CopePart* part;  // null: every key is read, and the result written to out and lse
};

constexpr int kMostTogether = 16;  // sequences that read the same keys at once

// A range of one sequence's keys for the query heads of one KV head: the unit of work of decode.
// Partial results are fp32: out [G, D], lse [G], highest score [G].
struct SplitWork {
  int64_t seq, kv_head, first_key, last_key;
  float* out;
  float* lse;
  float* highest;
};

// Packed weights of a linear layer (linear_tile.h): panels of kPanel rows, in each the chunks of
// kChunk steps along the inputs, in each the strips of kStripRows rows, in each the steps of a
// strip's rows, kStepBytes of each row. What a thread reads is one stream.
constexpr int kStripRows = 4;
constexpr int kPanel = 32;
constexpr int kStepBytes = 64;
constexpr int kChunk = 64;
constexpr int kRowGroup = 64;  // input rows whose chunk stays in the second-level cache

// Steps of a row of so many inputs, the last filled up.
inline int64_t steps_of(int64_t num_inputs, int64_t item_bytes) {
  return (num_inputs * item_bytes + kStepBytes - 1) / kStepBytes;
}

// Strips of a panel, the last filled up.
inline int64_t strips_of(int64_t num_outputs, int64_t panel) {
  const int64_t left = num_outputs - panel * kPanel;
  return ((left < kPanel ? left : kPanel) + kStripRows - 1) / kStripRows;
}

// out[m] = inputs[m] . weight^T + bias.
struct Linear {
  int64_t dtype;
  int64_t num_rows, num_outputs, num_inputs;
  const void* x;
  int64_t x_row_stride;
  const void* packed;
  const void* bias;  // [num_outputs], or null
  void* out;
  int64_t out_row_stride;
};

// A linear layer's weights [num_outputs, num_inputs], to be packed.
struct LinearWeight {
  int64_t dtype, num_outputs, num_inputs;
  const void* weight;
  int64_t row_stride;
  void* packed;
};

// The kernels of one instruction set. Scratch is per thread, 64-byte aligned, counted in floats.
struct Kernels {
  const char* name;
  size_t (*prefill_scratch)(const Shape&);
  void (*prefill_tile)(const Prefill&, const TileWork&, float* scratch);
  size_t (*decode_scratch)(const Shape&, int64_t together);
  // `count` ranges, up to kMostTogether, that are the same keys of different sequences.
  void (*decode_split)(const Decode&, const SplitWork*, int64_t count, float* scratch);
  // Joins `parts` partial results [parts, G, D] / [parts, G] into the output rows of a KV head;
  // the sum is made in place.
  void (*decode_merge)(const Decode&, int64_t seq, int64_t kv_head, float* out,
                       const float* lse, const float* highest, int64_t parts);
  size_t (*row_scores_scratch)(const RowScores&);
  void (*row_scores)(const RowScores&, const RowWork&, float* scratch);
  void (*block_means)(const BlockMeans&, int64_t index);  // counts heads x blocks
  void (*tile_means)(const TileMeans&, int64_t tile);
  size_t (*cope_scratch)(const Cope&);
  void (*cope_tile)(const Cope&, const CopeWork&, float* scratch);
  // Copies rows of inputs as `linear_panel` reads them; `row_bytes` is such a row's.
  size_t (*linear_row_bytes)(const Linear&);
  void (*linear_row)(const Linear&, int64_t row, void* to);
  // A panel's outputs of up to kRowGroup rows from first_row on; `rows` are their inputs.
  void (*linear_panel)(const Linear&, int64_t panel, int64_t first_row, const void* rows,
                       float* scratch);
};

const Kernels* generic_kernels();
#if defined(__x86_64__)
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();
#endif

}  // namespace vllm_sparse
