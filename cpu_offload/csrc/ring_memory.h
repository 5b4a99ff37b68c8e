// The places in a ring's memory.
#pragma once

#include "ring.h"

namespace vllm_sparse {

// Of one item: where its parts are to be read or written.
struct RingAnswer {
  int64_t* rows;  // read for it; kLost
  float* lse;     // [G]
  float* out;     // [G, D]
};

// [head][slots: head, slot numbers, first, last, q][actors: head, own, for each slot done, answers]
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
  // [kThreads] the answer's memory that each thread has for itself.
  std::atomic<uint32_t>* own(int64_t a) const {
    return reinterpret_cast<std::atomic<uint32_t>*>(of_actor(a) + sizeof(RingActor));
  }
  // [items] ticket << 32 | the answer's memory.
  std::atomic<uint64_t>* done(int64_t a, int64_t at) const {
    return reinterpret_cast<std::atomic<uint64_t>*>(of_actor(a) + sizeof(RingActor) + kOwn +
                                                    at * padded(sizes_.items * 8));
  }
  // How many there are: one for each place, and one for each thread.
  int64_t answers() const { return kDepth * sizes_.items + kThreads; }
  RingAnswer answer(int64_t a, int64_t i) const {
    char* at = of_actor(a) + sizeof(RingActor) + kOwn + kDepth * padded(sizes_.items * 8) +
               i * sizes_.answer;
    return {reinterpret_cast<int64_t*>(at), reinterpret_cast<float*>(at + 64),
            reinterpret_cast<float*>(at + 64 + sizes_.lse)};
  }

 private:
  static int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

  static constexpr int64_t kOwn = kThreads * sizeof(uint32_t);

  struct Sizes {
    int64_t items, lse, slot, answer, actor;
    Sizes(const Host& h, int64_t batch) {
      items = batch * h.kv_heads;
      lse = padded(h.group * 4);
      const int64_t out = h.group * h.head_size * 4;
      slot = 64 + padded(batch * 4) + padded(batch * 16) + padded(items * out);
      answer = 64 + lse + padded(out);
      actor = sizeof(RingActor) + kOwn + kDepth * padded(items * 8) +
              (kDepth * items + kThreads) * answer;
    }
  };

  char* of_slot(int64_t at) const { return memory_ + sizeof(RingHead) + at * sizes_.slot; }
  char* of_actor(int64_t a) const {
    return memory_ + sizeof(RingHead) + kDepth * sizes_.slot + a * sizes_.actor;
  }

  char* memory_;
  int64_t batch_, actors_;
  Sizes sizes_;
};

}  // namespace vllm_sparse
