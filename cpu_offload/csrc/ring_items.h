// A ticket's items: who takes them, what they ask for, and their answers.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "gather.h"
#include "ring_memory.h"

namespace vllm_sparse {
namespace {

// Claims the next item of a ticket: its number, or -1.
int64_t claim(RingSlot* slot, uint32_t ticket, int64_t items) {
  uint64_t seen = slot->claim.load(std::memory_order_acquire);
  for (;;) {
    const int64_t item = static_cast<int64_t>(seen & kClosed);
    if (static_cast<uint32_t>(seen >> 32) != ticket || item >= items) return -1;
    if (slot->claim.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) return item;
  }
}

// Enters an answer in its place, unless the slot bears another ticket by now. What was there before,
// or `answer` where nobody waits for it any more: memory that is the caller's from here on.
//
// Looked at in this order, `before` is of no later ticket where the slot bears this one; and where a
// later one comes into the place in between, there is no exchange. Numbers are not compared by size:
// a place may not be used for so long that they begin anew.
uint32_t enter(RingSlot* slot, std::atomic<uint64_t>* place, uint32_t ticket, uint32_t answer) {
  uint64_t before = place->load(std::memory_order_acquire);
  while (slot->claim.load(std::memory_order_acquire) >> 32 == ticket) {
    if (place->compare_exchange_weak(before, uint64_t{ticket} << 32 | answer,
                                     std::memory_order_acq_rel, std::memory_order_acquire)) {
      return static_cast<uint32_t>(before);
    }
  }
  return answer;
}

// What an item asks for, with every number in bounds whatever the shared memory says.
bool take(const Host& h, const RingMemory& m, int64_t at, int64_t number, int64_t layer,
          HostItem* item) {
  const int64_t b = number / h.kv_heads, most = h.max_pages << h.shift;
  item->kv_head = number % h.kv_heads;
  item->layer = layer;
  item->slot = m.slots(at)[b];
  item->first = m.first(at)[b];
  item->last = m.last(at)[b];
  item->q = m.q(at) + number * h.group * h.head_size;
  item->rows_read = 0;
  return layer >= 0 && layer < h.layers && item->slot >= 0 && item->slot < h.max_requests &&
         item->first >= 0 && item->last <= most;
}

void answer(const Host& h, HostItem& item, int64_t operation, bool valid, float* scratch) {
  const int64_t numbers = h.group * h.head_size;
  if (operation == kEcho) {
    std::memcpy(item.out, item.q, numbers * sizeof(float));
    std::memset(item.lse, 0, h.group * sizeof(float));
    return;
  }
  if (!valid) {
    item.rows_read = kLost;
    return;
  }
  if (item.last <= item.first) {
    std::memset(item.out, 0, numbers * sizeof(float));
    for (int64_t g = 0; g < h.group; ++g) item.lse[g] = -std::numeric_limits<float>::infinity();
    return;
  }
  offload_kernels()->attend(h, item, scratch);
}

int64_t longest(const RingMemory& m, int64_t at, int64_t batch, int64_t limit) {
  int64_t most = 0;
  for (int64_t b = 0; b < batch; ++b) most = std::max(most, m.last(at)[b] - m.first(at)[b]);
  return std::min(most, limit);
}

}  // namespace
}  // namespace vllm_sparse
