// Questions and answers in shared memory: one side asks, any number of others answer, and the one
// that asks answers what nobody else does. Mirrored in cpu_offload/ring.py.
//
// A ticket is a batch of items, in one of kDepth slots. Whoever has time claims items one by one,
// the asking side included once it has nothing else to do. The waiting is a spin, then a futex, with
// a deadline.
//
// Each thread of an actor writes an answer to memory that it alone has, and then enters where that
// is, with the ticket's number, in the item's place; from there it takes in exchange the memory that
// was entered before. So one that was stopped in the middle, and goes on later, spoils nothing: it
// finds that the slot bears another ticket, and keeps its answer to itself. None waits for another.
#pragma once

#include <atomic>
#include <cstdint>

#include "host.h"

namespace vllm_sparse {

constexpr int64_t kDepth = 2;     // tickets that may be open at a time
constexpr int64_t kThreads = 256;  // of an actor, at most

enum RingOperation : int64_t { kAttend = 0, kEcho = 1 };

struct alignas(64) RingHead {
  std::atomic<uint32_t> published;  // number of the newest ticket; answerers sleep on it
  alignas(64) std::atomic<uint32_t> parked;    // answerers asleep
  alignas(64) std::atomic<uint32_t> answered;  // grows with each answer; the asking side sleeps on it
  alignas(64) std::atomic<uint32_t> waiting;   // the asking side is asleep
  std::atomic<uint32_t> closing;
};

struct alignas(64) RingSlot {
  std::atomic<uint64_t> claim;  // ticket << 32 | next item; kClosed: none can be claimed
  std::atomic<int64_t> operation, layer, items;
};

constexpr uint64_t kClosed = 0xffffffffu;

struct alignas(64) RingActor {
  std::atomic<uint64_t> items;    // answered since the start
  std::atomic<uint64_t> busy_ns;  // spent on them
  std::atomic<uint64_t> beat;     // grows while it serves
};

// Where everything lies in the memory of this process; all sizes in bytes.
struct Ring {
  char* memory;
  int64_t max_batch, actors;
  int64_t spin_ns;  // before sleeping
};

// A ticket, as the asking side sees it.
struct RingAsk {
  int64_t operation, layer, batch;
  const int32_t* slots;  // [batch]
  const int64_t* first;  // [batch]
  const int64_t* last;   // [batch]
  int64_t dtype;         // of q
  const void* q;         // [batch, Hkv * G, D]
  int64_t ticket;        // written
};

struct RingCollect {
  int64_t ticket;
  float* out;  // [batch, Hkv * G, D]
  float* lse;  // [batch, Hkv * G]
  int64_t deadline_ns;  // after which what is missing is answered here
  int64_t processes;    // number of pidfds
  const int32_t* pidfds;  // of the actors, -1: none; one that ended is not waited for
  // Written:
  int64_t rows_read, rows_there;
  int64_t own;      // items that the asking side claimed
  int64_t rescued;  // items that it answered as others did not
  int64_t late;     // 1: the deadline was reached
  int64_t ended;    // bit mask of pidfds
  int64_t wait_ns;  // asleep or spinning
};

}  // namespace vllm_sparse
