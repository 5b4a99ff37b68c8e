// How a batch's decode is cut into pieces of work, and where the parts of its result lie.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace vllm_sparse {

constexpr int64_t kMinSplit = 1024;  // keys; below this a thread's start costs more than it saves

// Keys of a range, of `keys` in all (times KV heads): about four pieces of work a thread, so that the
// last to finish is not far behind.
inline int64_t split_of(int64_t keys, int64_t threads) {
  if (threads == 1) return INT64_MAX / 2;
  const int64_t split = keys / (4 * threads) + 1;
  return split < kMinSplit ? kMinSplit : split;
}

// Whether what is said of shared keys is of this batch: each sequence in one tile at most, and with
// the keys of that tile, as many as it has or fewer.
inline bool shared_keys_fit(const Decode& a) {
  if (a.num_tiles == 0) return true;
  if (a.most_members > kMostTogether) return false;
  int64_t sharing = 0, members = 0;
  for (int64_t s = 0; s < a.shape.num_seqs; ++s) {
    if (a.shared_keys[s] < 0 || a.shared_keys[s] > a.seq_lens[s]) return false;
    sharing += a.shared_keys[s] > 0;
  }
  for (int64_t z = 0; z < a.num_tiles; ++z) {
    if (a.tile_keys[z] <= 0) continue;
    int64_t before = -1;  // members ascend: none is in a tile twice
    for (int64_t i = 0; i < a.most_members; ++i) {
      const int64_t s = a.members[z * a.most_members + i];
      if (s < 0) break;
      if (s <= before || s >= a.shape.num_seqs || a.shared_keys[s] != a.tile_keys[z]) return false;
      before = s;
      ++members;
    }
  }
  return members == sharing;
}

// Ranges of up to `split` keys of each (sequence, KV head). The keys that a tile of sequences
// shares are cut apart from the rest: a piece has such a range of all of them.
class DecodeWork {
 public:
  struct Parts {
    float* out;  // [count, G, D], in the order of the keys
    float* lse;  // [count, G]
    float* highest;
    int64_t count;
  };

  DecodeWork(const Decode& a, int64_t split)
      : kv_heads_(a.shape.num_kv_heads), group_(a.shape.num_heads / kv_heads_),
        head_size_(a.shape.head_size) {
    // A piece of a tile costs up to as much as that of all its sequences.
    std::vector<int64_t> tile_split(a.num_tiles), shared_parts(a.shape.num_seqs);
    for (int64_t z = 0; z < a.num_tiles; ++z) {
      const int64_t members = count_members(a, z);
      if (members == 0) continue;
      tile_split[z] = split / members < kBlock ? kBlock : split / members;
      for (int64_t i = 0; i < members; ++i) {
        shared_parts[member(a, z, i)] = ranges(a.tile_keys[z], tile_split[z]);
      }
    }
    int64_t parts = 0;
    for (int64_t s = 0; s < a.shape.num_seqs; ++s) {
      const int64_t own = ranges(a.seq_lens[s] - first_own(a, s), split);
      for (int64_t h = 0; h < kv_heads_; ++h) {
        first_part_.push_back(parts);
        parts += shared_parts[s] + own;
      }
    }
    first_part_.push_back(parts);
    out_.resize(parts * group_ * head_size_);
    lse_.resize(parts * group_);
    highest_.resize(parts * group_);
    for (int64_t z = 0; z < a.num_tiles; ++z) {
      const int64_t members = count_members(a, z);
      for (int64_t h = 0; members > 0 && h < kv_heads_; ++h) {
        cut(0, a.tile_keys[z], tile_split[z], [&](int64_t j, int64_t first, int64_t last) {
          for (int64_t i = 0; i < members; ++i) add(member(a, z, i), h, j, first, last);
        });
      }
    }
    for (int64_t s = 0; s < a.shape.num_seqs; ++s) {
      for (int64_t h = 0; h < kv_heads_; ++h) {
        cut(first_own(a, s), a.seq_lens[s], split, [&](int64_t j, int64_t first, int64_t last) {
          add(s, h, shared_parts[s] + j, first, last);
        });
      }
    }
    first_work_.push_back(work_.size());
  }

  int64_t pieces() const { return static_cast<int64_t>(first_work_.size()) - 1; }
  const SplitWork* first(int64_t piece) const { return work_.data() + first_work_[piece]; }
  int64_t count(int64_t piece) const { return first_work_[piece + 1] - first_work_[piece]; }
  // The most sequences of a piece.
  int64_t together() const {
    int64_t most = 1;
    for (int64_t i = 0; i < pieces(); ++i) most = count(i) > most ? count(i) : most;
    return most;
  }
  Parts parts(int64_t seq, int64_t kv_head) {
    const int64_t i = seq * kv_heads_ + kv_head, part = first_part_[i];
    return {out_.data() + part * group_ * head_size_, lse_.data() + part * group_,
            highest_.data() + part * group_, first_part_[i + 1] - part};
  }

 private:
  static int64_t member(const Decode& a, int64_t tile, int64_t i) {
    return a.members[tile * a.most_members + i];
  }
  static int64_t count_members(const Decode& a, int64_t tile) {
    int64_t n = 0;
    while (a.tile_keys[tile] > 0 && n < a.most_members && member(a, tile, n) >= 0) ++n;
    return n;
  }
  static int64_t first_own(const Decode& a, int64_t seq) {
    return a.num_tiles > 0 ? a.shared_keys[seq] : 0;
  }
  static int64_t ranges(int64_t keys, int64_t split) { return (keys + split - 1) / split; }

  template <class Each>
  void cut(int64_t begin, int64_t end, int64_t split, const Each& each) {
    int64_t j = 0;
    for (int64_t n = begin; n < end; n += split, ++j) {
      first_work_.push_back(work_.size());
      each(j, n, end - n < split ? end : n + split);
    }
  }
  void add(int64_t seq, int64_t kv_head, int64_t part, int64_t first, int64_t last) {
    const int64_t at = (first_part_[seq * kv_heads_ + kv_head] + part) * group_;
    work_.push_back({seq, kv_head, first, last, out_.data() + at * head_size_, lse_.data() + at,
                     highest_.data() + at});
  }

  int64_t kv_heads_, group_, head_size_;
  std::vector<SplitWork> work_;
  std::vector<int64_t> first_work_;  // of each piece, and the end
  std::vector<int64_t> first_part_;  // of each (sequence, KV head), and the end
  std::vector<float> out_, lse_, highest_;
};

}  // namespace vllm_sparse
