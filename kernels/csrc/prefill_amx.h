// Prefill in bf16 on CPUs with matrix tiles (AMX): the query heads of one KV head together.
//
// A product of tiles wants its left operand in rows and its right one as pairs of rows. Scores are
// made transposed, K Q^T, so that K's rows are read where they lie in their page and the queries
// lie in the lanes as in the other kernels; the output accumulates as V^T P^T. Only V has to be
// rearranged, and that is shared by the heads that selected the block. Intrinsics, because no
// compiler makes tile instructions from loops; scores, softmax and sums stay fp32.
#pragma once

#include <immintrin.h>

#include "left_out.h"
#include "rows.h"
#include "softmax_tile.h"

namespace vllm_sparse {
namespace {

constexpr int kAmx = 16;               // rows of a tile register, and fp32 columns
constexpr int kAmxKeys = 32;           // keys (or dims) that one product sums over
constexpr int kTileBytes = kAmx * 64;  // a full tile register

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int i = 0; i < 8; ++i) {
      bytes_per_row[i] = 64;
      rows[i] = kAmx;
    }
  }
};

// Transposes 16 x 16 dwords.
inline void transpose(__m512i r[kAmx]) {
  Vec rows[kLanes];
  for (int i = 0; i < kAmx; ++i) rows[i] = (Vec)r[i];
  transpose(rows);
  for (int i = 0; i < kAmx; ++i) r[i] = (__m512i)rows[i];
}

// What the heads of a group share while one block is attended to.
struct AmxBlock {
  uint16_t* values;  // [2, D / 16, 16 dims, 32 keys] V^T as left operands
  uint16_t* p;       // [2, 4, 16 pairs of keys, 16 queries, 2] P^T as right operands
  uint16_t* keys;    // [64, D] gathered columns, or means
  uint16_t* means;   // [64, D] mean values
  float* scores;     // [64, 64]

  AmxBlock(float* scratch, int64_t head_size) {
    values = reinterpret_cast<uint16_t*>(scratch);
    keys = values + kBlock * head_size;
    p = keys + kBlock * head_size;
    scores = scratch + kBlock * head_size + kBlock * kTile / 2;
    means = reinterpret_cast<uint16_t*>(scores + kBlock * kTile);
  }
  static size_t floats(int64_t head_size) {
    return kBlock * head_size + kBlock * kTile / 2 + kBlock * kTile + kBlock * head_size / 2;
  }
};

struct AmxHead : SoftmaxTile {
  uint16_t* q;  // [D / 32, 4, 16 pairs of dims, 16 queries, 2] Q^T as right operands

  AmxHead(float* scratch, int64_t head_size_, float scale_, float* shared_scores) {
    head_size = head_size_;
    scale = scale_;
    scores = shared_scores;
    out = scratch;
    top = out + head_size * kTile;
    sum = top + kTile;
    q = reinterpret_cast<uint16_t*>(sum + kTile);
  }
  static size_t floats(int64_t head_size) {
    return head_size * kTile + 2 * kTile + head_size * kTile / 2;
  }
};

// Q^T as right operands, from rows of q; rows beyond `count` are zeros.
inline void amx_pack_queries(const BFloat16* q, int64_t row_stride, int count, int64_t head_size,
                             uint16_t* to) {
  for (int64_t d = 0; d < head_size; d += kAmxKeys) {
    for (int first = 0; first < kTile; first += kAmx, to += kTileBytes / 2) {
      __m512i r[16];
      for (int i = 0; i < kAmx; ++i) {
        r[i] = first + i < count ? _mm512_loadu_si512(q + (first + i) * row_stride + d)
                                 : _mm512_setzero_si512();
      }
      transpose(r);
      for (int i = 0; i < kAmx; ++i) _mm512_store_si512(to + i * 32, r[i]);
    }
  }
}

// V^T as left operands, from `count` rows; keys beyond are zeros, whatever the page holds there.
inline void amx_pack_values(const BFloat16* const* values, int count, int64_t head_size,
                            uint16_t* to) {
  for (int first = 0; first < kBlock; first += kAmxKeys) {
    for (int64_t d = 0; d < head_size; d += kAmx, to += kTileBytes / 2) {
      if (first >= count) continue;
      __m512i r[16];
      for (int i = 0; i < kAmx; ++i) {
        const auto row = [&](int n) {
          return n < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(
                                 reinterpret_cast<const __m256i*>(values[n] + d)))
                           : _mm512_setzero_si512();
        };
        r[i] = _mm512_or_si512(row(first + 2 * i),
                               _mm512_slli_epi32(row(first + 2 * i + 1), 16));
      }
      transpose(r);
      for (int i = 0; i < kAmx; ++i) _mm512_store_si512(to + i * 32, r[i]);
    }
  }
}

// P^T as right operands: pairs of keys side by side, rounded to bf16. P is never negative.
inline void amx_pack_probabilities(const float* scores, int count, uint16_t* to) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int first = 0; first < count; first += kAmxKeys) {
    for (int i = 0; i < kAmx; ++i) {
      const int n = first + 2 * i;
      for (int c = 0; c < kTile / kAmx; ++c) {
        const auto row = [&](int key) {
          return key < count ? _mm512_add_epi32(_mm512_loadu_si512(scores + key * kTile + c * kAmx), half)
                             : _mm512_setzero_si512();
        };
        const __m512i pair = _mm512_or_si512(_mm512_srli_epi32(row(n), 16),
                                             _mm512_and_si512(row(n + 1), high));
        _mm512_store_si512(to + ((first / kAmxKeys * 4 + c) * kAmx + i) * 32, pair);
      }
    }
  }
}

// scores [64, 64] = keys q^T; keys[i] is the first of 16 rows.
inline void amx_score(const uint16_t* const* keys, int64_t row_bytes, const uint16_t* q,
                      int64_t head_size, int count, float* scores) {
  for (int n = 0; n < count; n += 2 * kAmx) {
    const uint16_t* k0 = keys[n / kAmx];
    const uint16_t* k1 = keys[n / kAmx + 1];
    for (int c = 0; c < kTile; c += 2 * kAmx) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const uint16_t* right = q + c / kAmx * (kTileBytes / 2);
      for (int64_t d = 0; d < head_size; d += kAmxKeys, right += kTile / kAmx * (kTileBytes / 2)) {
        _tile_loadd(4, k0 + d, row_bytes);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + kTileBytes / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, k1 + d, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      float* to = scores + n * kTile + c;
      _tile_stored(0, to, kTile * 4);
      _tile_stored(1, to + kAmx, kTile * 4);
      _tile_stored(2, to + kAmx * kTile, kTile * 4);
      _tile_stored(3, to + kAmx * kTile + kAmx, kTile * 4);
    }
  }
}

// out [D, 64] += values p
inline void amx_accumulate(const AmxBlock& block, int count, int64_t head_size, float* out) {
  const int64_t left_step = head_size / kAmx * (kTileBytes / 2);
  for (int64_t d = 0; d < head_size; d += 2 * kAmx) {
    for (int c = 0; c < kTile; c += 2 * kAmx) {
      float* to = out + d * kTile + c;
      _tile_loadd(0, to, kTile * 4);
      _tile_loadd(1, to + kAmx, kTile * 4);
      _tile_loadd(2, to + kAmx * kTile, kTile * 4);
      _tile_loadd(3, to + kAmx * kTile + kAmx, kTile * 4);
      const uint16_t* left = block.values + d / kAmx * (kTileBytes / 2);
      const uint16_t* right = block.p + c / kAmx * (kTileBytes / 2);
      for (int n = 0; n < count; n += kAmxKeys) {
        _tile_loadd(4, left, 64);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + kTileBytes / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + kTileBytes / 2, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        left += left_step;
        right += kTile / kAmx * (kTileBytes / 2);
      }
      _tile_stored(0, to, kTile * 4);
      _tile_stored(1, to + kAmx, kTile * 4);
      _tile_stored(2, to + kAmx * kTile, kTile * 4);
      _tile_stored(3, to + kAmx * kTile + kAmx, kTile * 4);
    }
  }
}

// Attends one head to the block whose V is packed; keys[i] is the first of 16 rows of K.
inline void amx_attend(const AmxBlock& block, const AmxHead& head, const uint16_t* const* keys,
                       int64_t row_bytes, const Keys& wanted, int64_t first_query) {
  amx_score(keys, row_bytes, head.q, head.head_size, wanted.count, block.scores);
  int64_t position[kBlock];
  bool masked = false;
  for (int n = 0; n < wanted.count; ++n) {
    position[n] = wanted.position[n] - first_query;
    masked |= position[n] > 0;
  }
  if (masked) mask_causal(head, position, wanted.count);
  softmax_step(head, wanted.count);
  amx_pack_probabilities(block.scores, wanted.count, block.p);
  amx_accumulate(block, wanted.count, head.head_size, head.out);
}

// Attends one head to the means of what it leaves out, rounded to bf16.
inline void amx_attend_means(const Prefill& a, const TileWork& w, const TilePlace& place,
                             const Rows<BFloat16>& rows, const AmxBlock& block,
                             const AmxHead& head, int g) {
  const int64_t head_size = head.head_size;
  LeftOut left(a, w.list_row + g, place);
  float log_count[kBlock];
  BFloat16* mean_keys = reinterpret_cast<BFloat16*>(block.keys);
  BFloat16* mean_values = reinterpret_cast<BFloat16*>(block.means);
  const uint16_t* keys[kBlock / kAmx];
  const BFloat16* values[kBlock];
  for (int i = 0; i < kBlock / kAmx; ++i) keys[i] = block.keys + i * kAmx * head_size;
  for (int n = 0; n < kBlock; ++n) values[n] = mean_values + n * head_size;
  for (;;) {
    const int count =
        mean_rows(a, w, rows, left, mean_keys, mean_values, head_size, kStrip, log_count);
    if (count == 0) return;
    amx_pack_values(values, count, head_size, block.values);
    amx_score(keys, head_size * 2, head.q, head_size, count, block.scores);
    softmax_step(weigh(head, log_count, count), count);
    amx_pack_probabilities(block.scores, count, block.p);
    amx_accumulate(block, count, head_size, head.out);
  }
}

// The same work as `prefill_tile`, in bf16 and for head sizes that are multiples of 32.
inline void prefill_tile_amx(const Prefill& a, const TileWork& w, float* scratch) {
  const Shape& shape = a.shape;
  const int64_t head_size = shape.head_size;
  const TilePlace place(a, w);
  const Rows<BFloat16> rows(a.kv, w.seq, w.head / (shape.num_heads / shape.num_kv_heads));
  const int64_t row_bytes = a.kv.k_row_stride * static_cast<int64_t>(sizeof(BFloat16));
  const AmxBlock block(scratch, head_size);
  float* heads = scratch + AmxBlock::floats(head_size);
  const auto head_of = [&](int g) {
    return AmxHead(heads + g * AmxHead::floats(head_size), head_size, shape.scale, block.scores);
  };
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int g = 0; g < w.heads; ++g) {
    const AmxHead head = head_of(g);
    head.clear();
    const BFloat16* q = static_cast<const BFloat16*>(a.q) + place.begin * a.q_row_stride +
                        (w.head + g) * a.q_head_stride;
    amx_pack_queries(q, a.q_row_stride, place.rows, head_size, head.q);
  }

  GroupSelection selection(a, w, place.last_query);
  Keys wanted, next;
  const BFloat16* k[kBlock];
  const BFloat16* v[kBlock];
  const uint16_t* keys[kBlock / kAmx];
  for (; selection.block() >= 0; selection.advance()) {
    selection.block_keys(selection.block(), wanted);
    rows.find(wanted.position, wanted.count, k, v);
    for (int i = 0; i < kBlock / kAmx; ++i) {
      // Pages are multiples of 16 rows, so 16 rows lie together. Beyond the last key any row does:
      // what it scores is never looked at.
      const int64_t n = i * kAmx < wanted.count ? i * kAmx : 0;
      keys[i] = reinterpret_cast<const uint16_t*>(k[n]);
    }
    amx_pack_values(v, wanted.count, head_size, block.values);
    next.count = 0;
    if (selection.after() >= 0) {
      selection.block_keys(selection.after(), next);
      rows.find(next.position, next.count, k, v);
    }
    for (int g = 0; g < w.heads; ++g) {
      // A share of the next block's rows is fetched beside each head.
      for (int n = g * kBlock / w.heads; n < (g + 1) * kBlock / w.heads && n < next.count; ++n) {
        for (int64_t d = 0; d < head_size; d += 32) {
          __builtin_prefetch(k[n] + d, 0, 2);
          __builtin_prefetch(v[n] + d, 0, 2);
        }
      }
      if (selection.reads(g)) {
        amx_attend(block, head_of(g), keys, row_bytes, wanted, place.first_query);
      }
    }
  }
  for (int g = 0; g < w.heads; ++g) {
    if (a.columns != nullptr) {
      Selection& columns = selection.head(g);
      for (int i = 0; i < kBlock / kAmx; ++i) keys[i] = block.keys + i * kAmx * head_size;
      for (columns.columns(wanted); wanted.count > 0; columns.columns(wanted)) {
        rows.find(wanted.position, wanted.count, k, v);
        for (int n = 0; n < wanted.count; ++n) {
          std::memcpy(block.keys + n * head_size, k[n], head_size * 2);
        }
        amx_pack_values(v, wanted.count, head_size, block.values);
        amx_attend(block, head_of(g), keys, head_size * 2, wanted, place.first_query);
      }
    }
    if (a.k_means != nullptr) amx_attend_means(a, w, place, rows, block, head_of(g), g);
    write_tile<BFloat16>(a, head_of(g), place, w.head + g);
  }
  _tile_release();
}

inline size_t prefill_scratch_amx(const Shape& shape) {
  return AmxBlock::floats(shape.head_size) + kMaxHeads * AmxHead::floats(shape.head_size);
}

}  // namespace
}  // namespace vllm_sparse
