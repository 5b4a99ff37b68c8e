// What one query tile of one head reads, handed out 64 keys at a time.
#pragma once

#include "attention.h"

namespace vllm_sparse {
namespace {

// Up to 64 keys of the sequence.
struct Keys {
  int64_t position[kBlock];
  int count = 0;

  void add(int64_t key) { position[count++] = key; }
};

// Where a tile stands: rows of q and out, positions in the sequence.
struct TilePlace {
  int64_t begin;        // first row in q
  int rows;             // 1 .. 64
  int64_t first_query;  // position of the first row
  int64_t last_query;

  TilePlace(const Prefill& a, const TileWork& w) {
    begin = a.query_start_loc[w.seq] + w.tile_in_seq * kTile;
    const int64_t end = a.query_start_loc[w.seq + 1];
    rows = static_cast<int>(end - begin < kTile ? end - begin : kTile);
    first_query = a.seq_lens[w.seq] - (end - begin);
    last_query = first_query + rows - 1;
  }
};

// Walks one head's list: its blocks, then its columns. Invalid entries are passed over.
class Selection {
 public:
  Selection() = default;
  Selection(const Prefill& a, int64_t list_row, int64_t last_query)
      : last_block_(last_query / kBlock), last_query_(last_query) {
    if (a.blocks == nullptr) {
      blocks_left_ = last_block_ + 1;
    } else {
      blocks_ = a.blocks + a.block_offsets[list_row];
      blocks_left_ = a.block_offsets[list_row + 1] - a.block_offsets[list_row];
      columns_ = a.columns + a.column_offsets[list_row];
      columns_left_ = a.column_offsets[list_row + 1] - a.column_offsets[list_row];
    }
    settle();
  }

  // The block at hand; -1 when there is none left.
  int64_t block() const { return block_; }

  // The block that comes after `now`, the one being worked on; -1 when unknown or none.
  int64_t after(int64_t now) const {
    if (block_ != now) return block_;
    if (blocks_left_ < 2) return -1;
    const int64_t block = blocks_ == nullptr ? dense_block_ + 1 : blocks_[1];
    return block <= last_block_ ? block : -1;
  }

  void advance() {
    --blocks_left_;
    if (blocks_ != nullptr) ++blocks_; else ++dense_block_;
    settle();
  }

  // The keys of a block that the tile may see.
  void block_keys(int64_t block, Keys& keys) const {
    keys.count = 0;
    const int64_t end = (block + 1) * kBlock;
    for (int64_t key = block * kBlock; key < end && key <= last_query_; ++key) keys.add(key);
  }

  // The next columns; none when keys.count is 0.
  void columns(Keys& keys) {
    keys.count = 0;
    while (columns_left_ > 0 && keys.count < kBlock) {
      --columns_left_;
      const int64_t column = *columns_++;
      if (column >= 0 && column <= last_query_) keys.add(column);
    }
  }

 private:
  void settle() {
    block_ = -1;
    while (blocks_left_ > 0) {
      const int64_t block = blocks_ == nullptr ? dense_block_ : *blocks_;
      if (block >= 0 && block <= last_block_) {
        block_ = block;
        return;
      }
      --blocks_left_;
      ++blocks_;
    }
  }

  int64_t last_block_ = 0, last_query_ = 0;
  const int32_t* blocks_ = nullptr;  // null: every block
  const int32_t* columns_ = nullptr;
  int64_t blocks_left_ = 0;
  int64_t columns_left_ = 0;
  int64_t dense_block_ = 0;
  int64_t block_ = -1;
};

// The lists of a TileWork's heads, walked together: each block once for all heads that read it.
class GroupSelection {
 public:
  GroupSelection(const Prefill& a, const TileWork& w, int64_t last_query) : heads_(w.heads) {
    for (int g = 0; g < heads_; ++g) heads_at_[g] = Selection(a, w.list_row + g, last_query);
    find();
  }

  // The block at hand, -1 after the last, and the one after it, -1 when unknown or none.
  int64_t block() const { return block_; }
  int64_t after() const {
    int64_t least = -1;
    for (int g = 0; g < heads_; ++g) least = lower(least, heads_at_[g].after(block_));
    return least;
  }
  bool reads(int g) const { return heads_at_[g].block() == block_; }
  int readers() const {
    int count = 0;
    for (int g = 0; g < heads_; ++g) count += reads(g);
    return count;
  }
  void block_keys(int64_t block, Keys& keys) const { heads_at_[0].block_keys(block, keys); }

  void advance() {
    for (int g = 0; g < heads_; ++g) {
      if (reads(g)) heads_at_[g].advance();
    }
    find();
  }

  Selection& head(int g) { return heads_at_[g]; }

 private:
  static int64_t lower(int64_t a, int64_t b) { return a < 0 || (b >= 0 && b < a) ? b : a; }
  void find() {
    block_ = -1;
    for (int g = 0; g < heads_; ++g) block_ = lower(block_, heads_at_[g].block());
  }

  const int heads_;
  Selection heads_at_[kMaxHeads];
  int64_t block_ = -1;
};

}  // namespace
}  // namespace vllm_sparse
