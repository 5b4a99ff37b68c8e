// The heaviest blocks of rows of attention mass. Plain loops: one instruction set does for all.
#pragma once

#include <cstdint>
#include <cstring>

namespace vllm_sparse {

// Entries are binned by the top bits of their float: 16 bins an octave, 17 octaves down.
constexpr int kMassShift = 19;
constexpr int kMassBins = 17 * 16;
constexpr int64_t kMassBlock = 64;  // keys of an entry

struct Heaviest {
  const float* mass;  // [h, R, nb]
  const float* need;  // [h, R]
  int64_t heads, rows, blocks;
  uint8_t* chosen;  // [h, R, nb]
};

inline int32_t mass_level(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits < 0 ? 0 : bits >> kMassShift;  // below zero as zero
}

// The heaviest entries of a row whose sum reaches the need, whole bins at a time.
inline void heaviest_of_row(const float* mass, int64_t blocks, float need, uint8_t* chosen) {
  int32_t top = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t level = mass_level(mass[b]);
    top = level > top ? level : top;
  }
  float held[kMassBins] = {};
  const auto bin = [&](int64_t b) {
    const int32_t below = top - mass_level(mass[b]);
    return below < kMassBins ? below : kMassBins - 1;
  };
  for (int64_t b = 0; b < blocks; ++b) held[bin(b)] += mass[b] > 0.0f ? mass[b] : 0.0f;
  int last = need > 0.0f ? 0 : -1;
  for (float sum = held[0]; sum < need && last < kMassBins - 1;) sum += held[++last];
  for (int64_t b = 0; b < blocks; ++b) chosen[b] = bin(b) <= last;
}

// The same for each of a head's rows.
inline void heaviest(const Heaviest& a, int64_t head) {
  for (int64_t row = head * a.rows; row < (head + 1) * a.rows; ++row) {
    heaviest_of_row(a.mass + row * a.blocks, a.blocks, a.need[row], a.chosen + row * a.blocks);
  }
}

}  // namespace vllm_sparse
