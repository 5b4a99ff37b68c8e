// The places in a ring's memory.
#pragma once

#include "ring.h"

namespace vllm_sparse {

// [head][slots: head, slot numbers, first, last, q][actors: head, for each slot done, rows, lse, out]
class RingMemory {
 public:
  RingMemory(const Host& h, const Ring& ring)
      : memory_(ring.memory), batch_(ring.max_batch), actors_(ring.actors), sizes_(h, batch_) {}

  static int64_t bytes(const Host& h, int64_t batch, int64_t actors) {
    const Sizes s(h, batch);
    return sizeof(RingHead) + kDepth * s.slot + actors * s.actor;
  }

  int64_t actors() const { return actors_; }
  int64_t max_items() const { return sizes_.items; }
  RingHead* head() const { return reinterpret_cast<RingHead*>(memory_); }

  RingSlot* slot(int64_t at) const { return reinterpret_cast<RingSlot*>(of_slot(at)); }
  int32_t* slots(int64_t at) const { return reinterpret_cast<int32_t*>(of_slot(at) + 64); }
  int64_t* first(int64_t at) const {
    return reinterpret_cast<int64_t*>(of_slot(at) + 64 + padded(batch_ * 4));
  }
  int64_t* last(int64_t at) const { return first(at) + batch_; }
  float* q(int64_t at) const {
    return reinterpret_cast<float*>(of_slot(at) + 64 + padded(batch_ * 4) + padded(batch_ * 16));
  }

  RingActor* actor(int64_t a) const { return reinterpret_cast<RingActor*>(of_actor(a)); }
  std::atomic<uint32_t>* done(int64_t a, int64_t at) const {
    return reinterpret_cast<std::atomic<uint32_t>*>(answers(a, at));
  }
  int64_t* rows(int64_t a, int64_t at) const {
    return reinterpret_cast<int64_t*>(answers(a, at) + padded(sizes_.items * 4));
  }
  float* lse(int64_t a, int64_t at) const {
    return reinterpret_cast<float*>(answers(a, at) + padded(sizes_.items * 4) +
                                    padded(sizes_.items * 8));
  }
  float* out(int64_t a, int64_t at) const {
    return reinterpret_cast<float*>(answers(a, at) + padded(sizes_.items * 4) +
                                    padded(sizes_.items * 8) + padded(sizes_.lse));
  }

 private:
  static int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

  struct Sizes {
    int64_t items, lse, slot, answers, actor;
    Sizes(const Host& h, int64_t batch) {
      items = batch * h.kv_heads;
      lse = items * h.group * 4;
      const int64_t out = lse * h.head_size;
      slot = 64 + padded(batch * 4) + padded(batch * 16) + padded(out);
      answers = padded(items * 4) + padded(items * 8) + padded(lse) + padded(out);
      actor = sizeof(RingActor) + kDepth * answers;
    }
  };

  char* of_slot(int64_t at) const { return memory_ + sizeof(RingHead) + at * sizes_.slot; }
  char* of_actor(int64_t a) const {
    return memory_ + sizeof(RingHead) + kDepth * sizes_.slot + a * sizes_.actor;
  }
  char* answers(int64_t a, int64_t at) const {
    return of_actor(a) + sizeof(RingActor) + at * sizes_.answers;
  }

  char* memory_;
  int64_t batch_, actors_;
  Sizes sizes_;
};

}  // namespace vllm_sparse
