// The cheapest selection of each pattern that covers a head's mass, judged on sampled rows. The
// meaning stands in kernels/pattern_reference.py. Plain loops: one instruction set does for all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace vllm_sparse {

// Attention mass of sampled rows outside the last tile of a chunk.
struct SampledMass {
  const float* blocks;        // [h, S, nb]
  const int64_t* row_tile;    // [S] tile of each row
  const int64_t* last_block;  // [T] last block of each tile
  const float* coverage;      // [h]
  int64_t heads, rows, tiles, num_blocks;
};

struct LeastKeys {
  SampledMass mass;
  const float* squares;  // [h, S, nb]
  float* keys;           // [h]
};

struct WindowSearch {
  SampledMass mass;
  float* cost;      // [h]
  int64_t* offset;  // [h]
};

struct ColumnSearch {
  SampledMass mass;
  const int64_t* columns;    // [h, M]
  const float* column_mass;  // [h, S, M]
  int64_t width, first_key;
  float column_price, neighbour;
  double growth;
  int64_t levels;
  const uint8_t* wanted;  // [h]
  float* cost;         // [h]
  uint8_t* diagonals;  // [h, nb]
  uint8_t* taken;      // [h, M]
};

struct ThresholdSearch {
  SampledMass mass;
  const float* score;  // [h, T, nb]
  const float* edges;  // [levels]
  int64_t levels;
  float* cost;      // [h]
  uint8_t* chosen;  // [h, T, nb]
};

struct SortColumns {
  const int64_t* columns;  // [h, M]
  const uint8_t* keep;     // [h, M]
  int64_t heads, width;
  int32_t* ascending;  // [h, M]
  int64_t* count;      // [h]
};

namespace {

constexpr int64_t kBlockKeys = 64;
constexpr float kNever = std::numeric_limits<float>::infinity();

// What every selection of a tile holds: block 0, the tile's last block and the one before.
inline bool in_base(int64_t block, int64_t last) { return block == 0 || block >= last - 1; }

inline float base_cost(const SampledMass& a) {
  int64_t blocks = 0;
  for (int64_t t = 0; t + 1 < a.tiles; ++t) blocks += std::min<int64_t>(a.last_block[t] + 1, 3);
  return static_cast<float>(static_cast<double>(blocks * kBlockKeys) / (a.tiles - 1));
}

// Keys that a tile reads on average for each block offset outside the base.
inline std::vector<float> offset_cost(const SampledMass& a) {
  std::vector<float> cost(a.num_blocks);
  for (int64_t t = 0; t + 1 < a.tiles; ++t) {
    for (int64_t o = 2; o < a.last_block[t]; ++o) cost[o] += 1.0f;
  }
  for (float& c : cost) c = c / static_cast<float>(a.tiles - 1) * kBlockKeys;
  return cost;
}

inline float base_mass(const SampledMass& a, int64_t head, int64_t row) {
  const float* mass = a.blocks + (head * a.rows + row) * a.num_blocks;
  const int64_t last = a.last_block[a.row_tile[row]];
  float sum = mass[0];
  for (int64_t b = std::max<int64_t>(last - 1, 1); b <= last; ++b) sum += mass[b];
  return sum;
}

// The mean over rows less its standard error reaches the coverage. covered: of each row, `step`
// numbers apart.
inline bool covers(const float* covered, int64_t rows, int64_t step, float coverage) {
  double sum = 0.0, squares = 0.0;
  for (int64_t r = 0; r < rows; ++r) sum += covered[r * step];
  const double mean = sum / rows;
  for (int64_t r = 0; r < rows; ++r) {
    const double apart = covered[r * step] - mean;
    squares += apart * apart;
  }
  const double error = std::sqrt(squares / (rows - 1) / rows);  // NaN for one row: not covered
  return static_cast<float>(mean - error) >= coverage;
}

inline void count_least_keys(const LeastKeys& l, int64_t head) {
  const SampledMass& a = l.mass;
  float keys = 0.0f;
  for (int64_t s = 0; s < a.rows; ++s) {
    const int64_t at = (head * a.rows + s) * a.num_blocks;
    float rest = 0.0f, squares = 0.0f;
    for (int64_t b = 1; b < a.last_block[a.row_tile[s]] - 1; ++b) {
      rest += a.blocks[at + b];
      squares += l.squares[at + b];
    }
    const float missing = a.coverage[head] - 1.0f + rest;
    const float least = missing * missing / std::max(squares, 1e-30f);
    if (!(missing <= 0.0f)) keys += least;  // what is not a number stays one
  }
  l.keys[head] = keys;
}

inline void search_window(const WindowSearch& w, int64_t head) {
  const SampledMass& a = w.mass;
  const std::vector<float> price = offset_cost(a);
  std::vector<float> covered(a.rows);
  for (int64_t s = 0; s < a.rows; ++s) covered[s] = base_mass(a, head, s);
  float cost = base_cost(a);
  for (int64_t o = 0; o < a.num_blocks; ++o) {
    cost += price[o];
    for (int64_t s = 0; s < a.rows && o >= 2; ++s) {
      const int64_t block = a.last_block[a.row_tile[s]] - o;
      if (block > 0) covered[s] += a.blocks[(head * a.rows + s) * a.num_blocks + block];
    }
    if (covers(covered.data(), a.rows, 1, a.coverage[head])) {
      w.cost[head] = cost;
      w.offset[head] = o;
      return;
    }
  }
  w.cost[head] = kNever;
  w.offset[head] = a.num_blocks - 1;
}

// Items that compete for a budget, diagonals first, then columns.
struct Items {
  const ColumnSearch& search;
  std::vector<float> cost;
  std::vector<uint64_t> order;
  std::vector<int32_t> level;
  std::vector<float> limits;  // what the levels may cost

  Items(const ColumnSearch& c, int64_t head) : search(c), cost(offset_cost(c.mass)) {
    const SampledMass& a = c.mass;
    const int64_t body = a.tiles - 1;
    for (int64_t m = 0; m < c.width; ++m) {
      // Tiles from the column's own on see it.
      const int64_t ahead = c.columns[head * c.width + m] - c.first_key;
      const int64_t tile = ahead > 0 ? ahead / kBlockKeys : 0;
      const int64_t seen = tile < body ? body - tile : 0;
      cost.push_back(c.column_price * static_cast<float>(seen) / static_cast<float>(body));
    }
    level.resize(cost.size());
    for (int64_t l = 0; l < c.levels; ++l) {
      limits.push_back(static_cast<float>(kBlockKeys * std::pow(c.growth, static_cast<double>(l))));
    }
  }

  // The first level that pays for each item when the best buys come first; `levels` for never.
  void buy(const float* worth) {
    order.clear();
    for (size_t i = 0; i < cost.size(); ++i) {
      level[i] = static_cast<int32_t>(search.levels);
      const float value = cost[i] > 0.0f ? worth[i] / cost[i] : 0.0f;
      if (!(value > 0.0f)) continue;  // and where it is not a number
      // The bits of positive floats are ordered as they are. The first of equals comes first.
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      order.push_back(static_cast<uint64_t>(~bits) << 32 | i);
    }
    std::sort(order.begin(), order.end(), [](uint64_t x, uint64_t y) { return x < y; });
    float spent = 0.0f;
    int32_t now = 0;
    for (const uint64_t item : order) {
      const size_t i = item & 0xffffffff;
      spent += cost[i];
      while (now < search.levels && spent > limits[now]) ++now;
      level[i] = now;
    }
  }
};

// The rows of a head, by block offset outside the base, and what items are worth over some rows.
struct HeadRows {
  const ColumnSearch& search;
  int64_t head, rows, blocks, width;
  std::vector<float> by_offset;  // [S, nb]

  HeadRows(const ColumnSearch& c, int64_t head)
      : search(c), head(head), rows(c.mass.rows), blocks(c.mass.num_blocks), width(c.width),
        by_offset(rows * blocks) {
    for (int64_t s = 0; s < rows; ++s) {
      const float* mass = c.mass.blocks + (head * rows + s) * blocks;
      const int64_t last = last_of(s);
      for (int64_t o = 2; o < last; ++o) by_offset[s * blocks + o] = mass[last - o];
    }
  }
  int64_t last_of(int64_t s) const { return search.mass.last_block[search.mass.row_tile[s]]; }
  const float* columns_of(int64_t s) const {
    return search.column_mass + (head * rows + s) * width;
  }

  // Over the rows first, first + step, ..: the mass of each diagonal and a little of its
  // neighbours', the mass of each column but for its heaviest row.
  std::vector<float> worth(int64_t first, int64_t end, int64_t step) const {
    std::vector<float> diagonal(blocks), sum(width), most(width);
    for (int64_t s = first; s < end; s += step) {
      const float* mass = by_offset.data() + s * blocks;
      for (int64_t o = 0; o < blocks; ++o) diagonal[o] += mass[o];
      const float* column = columns_of(s);
      for (int64_t m = 0; m < width; ++m) {
        sum[m] += column[m];
        most[m] = most[m] > column[m] ? most[m] : column[m];
      }
    }
    std::vector<float> result(diagonal);
    for (int64_t o = 2; o < blocks; ++o) {
      result[o] += search.neighbour * diagonal[o - 1];
      if (o + 1 < blocks) result[o] += search.neighbour * diagonal[o + 1];
    }
    for (int64_t m = 0; m < width; ++m) result.push_back(sum[m] - most[m]);
    return result;
  }

  // Mass that each level covers in a row, [levels + 1].
  void covered(int64_t s, const std::vector<int32_t>& level, float* to) const {
    const float* mass = by_offset.data() + s * blocks;
    for (int64_t o = 2; o < last_of(s); ++o) to[level[o]] += mass[o];
    const float* column = columns_of(s);
    for (int64_t m = 0; m < width; ++m) {
      if (!(column[m] > 0.0f)) continue;
      // A column counts from its own level on, until the block that it lies in comes.
      const int64_t offset = last_of(s) - search.columns[head * width + m] / kBlockKeys;
      const int32_t inside = level[offset > 0 ? offset : 0];
      const int32_t mine = level[blocks + m];
      if (mine >= inside) continue;
      to[mine] += column[m];
      to[inside] -= column[m];
    }
    to[0] += base_mass(search.mass, head, s);
    for (int64_t l = 1; l <= search.levels; ++l) to[l] += to[l - 1];
  }
};

inline void search_columns(const ColumnSearch& c, int64_t head) {
  std::fill_n(c.diagonals + head * c.mass.num_blocks, c.mass.num_blocks, uint8_t{0});
  std::fill_n(c.taken + head * c.width, c.width, uint8_t{0});
  c.cost[head] = kNever;
  if (!c.wanted[head]) return;
  const HeadRows rows(c, head);
  Items items(c, head);
  // What one half of the rows would take for a budget is judged on the other half.
  const int64_t half = rows.rows / 2, step = c.levels + 1;
  std::vector<float> covered(2 * half * step);
  for (int64_t p = 0; p < 2; ++p) {
    items.buy(rows.worth(1 - p, 2 * half, 2).data());
    for (int64_t s = p; s < 2 * half; s += 2) {
      rows.covered(s, items.level, covered.data() + s * step);
    }
  }
  uint8_t* diagonals = c.diagonals + head * rows.blocks;
  uint8_t* taken = c.taken + head * rows.width;
  int64_t best = 0;
  while (best < c.levels &&
         !covers(covered.data() + best, 2 * half, step, c.mass.coverage[head])) {
    ++best;
  }
  if (best == c.levels) return;
  items.buy(rows.worth(0, rows.rows, 1).data());
  float cost = base_cost(c.mass);
  for (int64_t i = 0; i < rows.blocks + rows.width; ++i) {
    const bool buy = items.level[i] <= best;
    if (buy) cost += items.cost[i];
    (i < rows.blocks ? diagonals[i] : taken[i - rows.blocks]) = buy;
  }
  c.cost[head] = cost;
}

// What cannot be judged is read; other scores are finite.
inline float judged(float score) {
  constexpr float kMost = std::numeric_limits<float>::max();
  if (score != score) return kNever;
  return score > kMost ? kMost : score < -kMost ? -kMost : score;
}

inline void search_threshold(const ThresholdSearch& t, int64_t head) {
  const SampledMass& a = t.mass;
  const int64_t blocks = a.num_blocks, step = t.levels + 1;
  std::vector<uint8_t> level(a.tiles * blocks, static_cast<uint8_t>(t.levels));
  std::vector<float> counted(step), covered(a.rows * step);
  for (int64_t tile = 0; tile < a.tiles; ++tile) {
    const float* score = t.score + (head * a.tiles + tile) * blocks;
    const int64_t last = a.last_block[tile];
    float best = -kNever;
    for (int64_t b = 0; b <= last; ++b) best = std::max(best, judged(score[b]));
    for (int64_t b = 0; b <= last; ++b) {
      const float gap = best - judged(score[b]);
      if (!(gap > t.edges[0])) {  // and infinity less infinity
        level[tile * blocks + b] = 0;
      } else if (gap <= t.edges[t.levels - 1]) {
        level[tile * blocks + b] = static_cast<uint8_t>(
            std::lower_bound(t.edges, t.edges + t.levels, gap) - t.edges);
      }
      if (tile + 1 < a.tiles && !in_base(b, last)) counted[level[tile * blocks + b]] += 1.0f;
    }
  }
  for (int64_t s = 0; s < a.rows; ++s) {
    const int64_t tile = a.row_tile[s];
    const float* mass = a.blocks + (head * a.rows + s) * blocks;
    float* to = covered.data() + s * step;
    for (int64_t b = 1; b < a.last_block[tile] - 1; ++b) to[level[tile * blocks + b]] += mass[b];
    to[0] += base_mass(a, head, s);
    for (int64_t l = 1; l < step; ++l) to[l] += to[l - 1];
  }
  int64_t best = 0;
  while (best < t.levels && !covers(covered.data() + best, a.rows, step, a.coverage[head])) ++best;
  float read = 0.0f;
  for (int64_t l = 0; l <= best; ++l) read += counted[l];
  const bool found = best < t.levels;
  t.cost[head] = found ? base_cost(a) + read * kBlockKeys / (a.tiles - 1) : kNever;
  for (int64_t tile = 0; tile < a.tiles; ++tile) {
    uint8_t* chosen = t.chosen + (head * a.tiles + tile) * blocks;
    const int64_t last = a.last_block[tile];
    for (int64_t b = 0; b < blocks; ++b) {
      chosen[b] = b <= last && (in_base(b, last) || (found && level[tile * blocks + b] <= best));
    }
  }
}

// The kept columns of a head, ascending, then -1.
inline void sort_columns(const SortColumns& c, int64_t head) {
  const int64_t* columns = c.columns + head * c.width;
  int32_t* to = c.ascending + head * c.width;
  int64_t found = 0;
  for (int64_t m = 0; m < c.width; ++m) {
    if (c.keep[head * c.width + m]) to[found++] = static_cast<int32_t>(columns[m]);
  }
  std::sort(to, to + found, [](int32_t x, int32_t y) { return x < y; });
  for (int64_t m = found; m < c.width; ++m) to[m] = -1;
  c.count[head] = found;
}

}  // namespace
}  // namespace vllm_sparse
