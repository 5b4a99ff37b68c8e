// How a step with contextual positions is cut into pieces of work.
//
// A chunk of a prompt is tiles of 64 rows, each over all its keys. A sequence with one query is a
// tile of a KV head's query heads over its newest keys, until all have reached the last position;
// what is left is plain attention, cut into ranges as decode is, by the kernels of decode.
#pragma once

#include <cstdint>
#include <vector>

#include "decode_work.h"

namespace vllm_sparse {

class CopePieces {
 public:
  std::vector<CopeWork> tiles;
  std::vector<SplitWork> ranges;  // after cut(): what the tiles left

  CopePieces(const Cope& a, int64_t threads)
      : a_(a), group_(a.shape.num_heads / a.shape.num_kv_heads) {
    int64_t keys = 0;
    for (int64_t s = 0; s < a.shape.num_seqs; ++s) {
      if (decodes(s)) keys += a.seq_lens[s];
    }
    split_ = split_of(keys * a.shape.num_kv_heads, threads);
    int64_t parts = 0;
    for (int64_t s = 0; s < a.shape.num_seqs; ++s) {
      if (!decodes(s)) continue;
      for (int64_t h = 0; h < a.shape.num_kv_heads; ++h) {
        rows_.push_back({s, h, parts, 1, {}});
        parts += 1 + (a.seq_lens[s] + split_ - 1) / split_;  // as many as there may be
      }
    }
    out_.resize(parts * group_ * a.shape.head_size);
    lse_.resize(parts * group_);
    highest_.resize(parts * group_);
    added_.resize(rows_.size() * group_);
    for (size_t i = 0; i < rows_.size(); ++i) {
      const int64_t at = rows_[i].first_part * group_;
      rows_[i].newest = {&out_[at * a.shape.head_size], &lse_[at], &added_[i * group_], 0};
      tiles.push_back({rows_[i].seq, 0, 1, rows_[i].kv_head * group_, static_cast<int>(group_),
                       &rows_[i].newest});
    }
    for (int64_t s = 0; s < a.shape.num_seqs; ++s) {
      if (!decodes(s)) add_tiles(s);
    }
  }

  void cut() {
    for (size_t i = 0; i < rows_.size(); ++i) {
      Row& row = rows_[i];
      for (int64_t key = 0; key < row.newest.first_key; key += split_, ++row.parts) {
        const int64_t left = row.newest.first_key - key;
        const int64_t end = key + (split_ < left ? split_ : left);
        const int64_t at = (row.first_part + row.parts) * group_;
        ranges.push_back({row.seq, row.kv_head, key, end, &out_[at * a_.shape.head_size],
                          &lse_[at], &highest_[at]});
        range_row_.push_back(i);
      }
    }
  }

  // What decode's kernels take a range for: one query a sequence, that of sequence s in row s.
  Decode decode(int64_t range) const { return decode_of(rows_[range_row_[range]].seq); }

  // Writes out and lse of the sequences with one query.
  template <class Merge>
  void join(const Merge& merge) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      const Row& row = rows_[i];
      float* lse = &lse_[row.first_part * group_];
      for (int64_t p = 1; p < row.parts; ++p) {
        for (int64_t g = 0; g < group_; ++g) lse[p * group_ + g] += row.newest.added[g];
      }
      merge(decode_of(row.seq), row.seq, row.kv_head, row.newest.out, lse, nullptr, row.parts);
    }
  }

 private:
  struct Row {
    int64_t seq, kv_head, first_part, parts;
    CopePart newest;
  };

  int64_t queries(int64_t s) const { return a_.query_start_loc[s + 1] - a_.query_start_loc[s]; }
  bool decodes(int64_t s) const { return queries(s) == 1 && group_ <= kTile; }

  void add_tiles(int64_t s) {
    for (int64_t row = 0; row < queries(s); row += kTile) {
      const int rows = static_cast<int>(queries(s) - row < kTile ? queries(s) - row : kTile);
      // Rows of a few tokens are filled up with heads, which read the same keys.
      const int64_t together = kTile / rows;
      for (int64_t h = 0; h < a_.shape.num_heads;) {
        const int64_t left = group_ - h % group_;
        const int64_t heads = left < together ? left : together;
        tiles.push_back({s, row, rows, h, static_cast<int>(heads), nullptr});
        h += heads;
      }
    }
  }

  Decode decode_of(int64_t seq) const {
    const int64_t ahead = a_.query_start_loc[seq] - seq;
    const int64_t bytes = a_.shape.dtype == kFloat32 ? 4 : 2;
    Decode d{};
    d.shape = a_.shape;
    d.kv = a_.kv;
    d.q = static_cast<const char*>(a_.q) + ahead * a_.q_row_stride * bytes;
    d.q_row_stride = a_.q_row_stride;
    d.q_head_stride = a_.q_head_stride;
    d.out = static_cast<char*>(a_.out) + ahead * a_.out_row_stride * bytes;
    d.out_row_stride = a_.out_row_stride;
    d.out_head_stride = a_.out_head_stride;
    d.lse = a_.lse + ahead * a_.shape.num_heads;
    d.softmax = kOnline;
    return d;
  }

  const Cope& a_;
  int64_t group_, split_;
  std::vector<Row> rows_;  // of sequences with one query, one for each KV head
  std::vector<size_t> range_row_;
  std::vector<float> out_, lse_, highest_, added_;
};

}  // namespace vllm_sparse
