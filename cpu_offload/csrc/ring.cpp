#include "ring.h"

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention.h"
#include "gather.h"
#include "ring_items.h"
#include "ring_memory.h"
#include "thread_pool.h"

#define VLLM_SPARSE_API extern "C" __attribute__((visibility("default")))

namespace vllm_sparse {
namespace {

static_assert(std::atomic<uint32_t>::is_always_lock_free, "words are shared between processes");
static_assert(std::atomic<uint64_t>::is_always_lock_free, "words are shared between processes");

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Sleeps while the word is `value`, for at most `ns`.
void futex_wait(std::atomic<uint32_t>* word, uint32_t value, int64_t ns) {
  if (ns <= 0) return;
  timespec t = {ns / 1000000000, ns % 1000000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT, value, &t, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Spins until ready() or the end of its time; says which.
template <class Ready>
bool spin(int64_t ns, const Ready& ready) {
  const int64_t end = now_ns() + ns;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
  } while (now_ns() < end);
  return false;
}

// vec.h is for files of one instruction set each: these are few numbers.
void to_floats(int64_t dtype, const void* from, int64_t n, float* to) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < n && dtype == kBFloat16; ++i) {
    const uint32_t bits = static_cast<uint32_t>(half[i]) << 16;
    std::memcpy(to + i, &bits, sizeof(bits));
  }
  if (dtype == kFloat32) std::memcpy(to, from, n * sizeof(float));
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

class Scratch {
 public:
  float* at_least(size_t floats) {
    if (floats > size_) {
      const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = floats;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float, Free> data_;
  size_t size_ = 0;
};

// Answers items of a slot until none is left.
void serve_slot(const Host& h, const RingMemory& m, int64_t actor, int64_t thread, int64_t at,
                Scratch* memory) {
  RingSlot* slot = m.slot(at);
  RingHead* head = m.head();
  RingActor* self = m.actor(actor);
  std::atomic<uint32_t>* own = m.own(actor) + thread;
  const int64_t numbers = h.group * h.head_size;
  for (;;) {
    const uint64_t seen = slot->claim.load(std::memory_order_acquire);
    const uint32_t ticket = static_cast<uint32_t>(seen >> 32);
    const int64_t items = slot->items.load(std::memory_order_relaxed);
    const int64_t operation = slot->operation.load(std::memory_order_relaxed);
    const int64_t layer = slot->layer.load(std::memory_order_relaxed);
    const uint32_t mine = own->load(std::memory_order_relaxed);
    if ((seen & kClosed) == kClosed || items > m.max_items() || mine >= m.answers()) return;
    // Once an item is claimed under this number, what was read above is this ticket's.
    const int64_t number = claim(slot, ticket, items);
    if (number < 0) return;
    const int64_t start = now_ns();
    HostItem item;
    const bool valid = take(h, m, at, number, layer, &item);
    const int64_t rows = valid ? std::max<int64_t>(item.last - item.first, 0) : 0;
    const size_t kernel = operation == kEcho ? 0 : offload_kernels()->attend_scratch(h, rows);
    float* scratch = memory->at_least(kernel + numbers);
    // A copy: the asking side may have given this ticket up, and write the next one over it.
    std::memcpy(scratch + kernel, item.q, numbers * sizeof(float));
    item.q = scratch + kernel;
    const RingAnswer to = m.answer(actor, mine);
    item.out = to.out;
    item.lse = to.lse;
    answer(h, item, operation, valid, scratch);
    *to.rows = item.rows_read;
    // Counted before it is told: who has the answer finds it in the counts.
    self->items.fetch_add(1, std::memory_order_relaxed);
    self->busy_ns.fetch_add(now_ns() - start, std::memory_order_relaxed);
    const uint32_t left = enter(slot, m.done(actor, at) + number, ticket, mine);
    if (left == mine) continue;
    own->store(left, std::memory_order_relaxed);
    head->answered.fetch_add(1, std::memory_order_seq_cst);
    if (head->waiting.load(std::memory_order_seq_cst) != 0) futex_wake(&head->answered);
  }
}

// Which of the processes have ended: a bit for each.
int64_t ended(const int32_t* pidfds, int64_t count) {
  int64_t mask = 0;
  for (int64_t i = 0; i < count && i < 63; ++i) {
    pollfd p = {pidfds[i], POLLIN, 0};
    if (pidfds[i] >= 0 && poll(&p, 1, 0) > 0) mask |= int64_t{1} << i;
  }
  return mask;
}

}  // namespace
}  // namespace vllm_sparse

using namespace vllm_sparse;

VLLM_SPARSE_API int64_t vllm_sparse_ring_bytes(const Host* host, int64_t max_batch,
                                               int64_t actors) {
  return RingMemory::bytes(*host, max_batch, actors);
}

// Publishes a ticket.
VLLM_SPARSE_API void vllm_sparse_ring_ask(const Host* host, const Ring* ring, RingAsk* ask) {
  const Host& h = *host;
  const RingMemory m(h, *ring);
  RingHead* head = m.head();
  uint32_t ticket = head->published.load(std::memory_order_relaxed) + 1;
  // 0 is the number of no ticket. The next is kDepth, whose slot is the one behind the last: with 1
  // two tickets in a row would be in one.
  static_assert((uint64_t{1} << 32) % kDepth == 0, "the slots take turns");
  if (ticket == 0) ticket = kDepth;
  const int64_t at = ticket % kDepth;
  RingSlot* slot = m.slot(at);
  slot->claim.store(uint64_t{ticket} << 32 | kClosed, std::memory_order_seq_cst);
  slot->operation.store(ask->operation, std::memory_order_relaxed);
  slot->layer.store(ask->layer, std::memory_order_relaxed);
  slot->items.store(ask->batch * h.kv_heads, std::memory_order_relaxed);
  std::memcpy(m.slots(at), ask->slots, ask->batch * sizeof(int32_t));
  std::memcpy(m.first(at), ask->first, ask->batch * sizeof(int64_t));
  std::memcpy(m.last(at), ask->last, ask->batch * sizeof(int64_t));
  const int64_t count = ask->batch * h.kv_heads * h.group * h.head_size;
  to_floats(ask->dtype, ask->q, count, m.q(at));
  slot->claim.store(uint64_t{ticket} << 32, std::memory_order_seq_cst);
  head->published.store(ticket, std::memory_order_seq_cst);
  if (head->parked.load(std::memory_order_seq_cst) != 0) futex_wake(&head->published);
  ask->ticket = ticket;
}

// Answers what is left of a ticket, waits for the others, and puts all answers together. 0; 1: memory
// ran out; 2: what says where rows lie was written over.
VLLM_SPARSE_API int vllm_sparse_ring_collect(const Host* host, const Ring* ring, RingCollect* c) {
  const Host& h = *host;
  const RingMemory m(h, *ring);
  RingHead* head = m.head();
  const uint32_t ticket = static_cast<uint32_t>(c->ticket);
  const int64_t at = ticket % kDepth, numbers = h.group * h.head_size;
  RingSlot* slot = m.slot(at);
  const int64_t items = slot->items.load(std::memory_order_relaxed);
  const int64_t operation = slot->operation.load(std::memory_order_relaxed);
  const int64_t layer = slot->layer.load(std::memory_order_relaxed);
  try {
    const int64_t batch = items / h.kv_heads;
    const int64_t rows = longest(m, at, batch, h.max_pages << h.shift);
    const size_t floats = operation == kEcho ? 0 : offload_kernels()->attend_scratch(h, rows);
    std::vector<uint8_t> have(items, 0);
    std::vector<int64_t> read(items, 0);
    const auto lost = [&] { return std::find(read.begin(), read.end(), kLost) != read.end(); };
    const auto answer_here = [&](int64_t number, float* scratch) {
      HostItem item;
      const bool valid = take(h, m, at, number, layer, &item);
      item.out = c->out + number * numbers;
      item.lse = c->lse + number * h.group;
      answer(h, item, operation, valid, scratch);
      read[number] = item.rows_read;
      have[number] = 1;
    };
    const int64_t threads = std::min<int64_t>(num_threads(), items);
    std::atomic<int64_t> own{0};
    const bool ran = parallel_for(threads, floats, [&](int64_t, float* scratch) {
      for (int64_t n = claim(slot, ticket, items); n >= 0; n = claim(slot, ticket, items)) {
        answer_here(n, scratch);
        own.fetch_add(1, std::memory_order_relaxed);
      }
    });
    if (!ran) return 1;
    if (lost()) return 2;
    c->own = own.load();

    int64_t left = items - c->own;
    const auto gather = [&] {
      for (int64_t n = 0; n < items && left > 0; ++n) {
        for (int64_t a = 0; a < m.actors() && !have[n]; ++a) {
          const std::atomic<uint64_t>* done = m.done(a, at) + n;
          const uint64_t told = done->load(std::memory_order_acquire);
          const int64_t place = static_cast<uint32_t>(told);
          if (told >> 32 != ticket || place >= m.answers()) continue;
          const RingAnswer from = m.answer(a, place);
          std::memcpy(c->out + n * numbers, from.out, numbers * sizeof(float));
          std::memcpy(c->lse + n * h.group, from.lse, h.group * sizeof(float));
          const int64_t rows_read = *from.rows;
          // An actor that is started again has its memory anew.
          std::atomic_thread_fence(std::memory_order_acquire);
          if (done->load(std::memory_order_relaxed) != told) continue;
          read[n] = rows_read;
          have[n] = 1;
          --left;
        }
      }
      return left == 0;
    };
    const int64_t start = now_ns(), end = start + c->deadline_ns;
    constexpr int64_t kLook = 2000000;  // between looks at the processes that are waited for
    c->ended = c->late = 0;
    while (!gather()) {
      uint32_t seen = head->answered.load(std::memory_order_seq_cst);
      const auto more = [&] { return head->answered.load(std::memory_order_acquire) != seen; };
      if (gather()) break;
      if (spin(ring->spin_ns, more)) continue;
      head->waiting.store(1, std::memory_order_seq_cst);
      if (!more()) futex_wait(&head->answered, seen, kLook);
      head->waiting.store(0, std::memory_order_relaxed);
      if (more()) continue;
      c->ended = ended(c->pidfds, c->processes);
      if (c->ended != 0) break;
      if (now_ns() >= end) {
        c->late = 1;
        break;
      }
    }
    c->wait_ns = now_ns() - start;
    gather();
    c->rescued = left;
    if (left > 0) {
      std::vector<int64_t> missing;
      for (int64_t n = 0; n < items; ++n) {
        if (!have[n]) missing.push_back(n);
      }
      const auto run = [&](int64_t i, float* scratch) { answer_here(missing[i], scratch); };
      if (!parallel_for(missing.size(), floats, run)) return 1;
    }
    if (lost()) return 2;
    c->rows_read = c->rows_there = 0;
    for (int64_t n = 0; n < items; ++n) {
      const int64_t b = n / h.kv_heads;
      c->rows_read += read[n];
      c->rows_there += std::max<int64_t>(m.last(at)[b] - m.first(at)[b], 0);
    }
    slot->claim.store(uint64_t{ticket} << 32 | kClosed, std::memory_order_release);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// To be called before an actor's threads serve, and after those of its last start have ended,
// wherever in an answer that was: gives each place and each thread its memory.
VLLM_SPARSE_API void vllm_sparse_ring_start(const Host* host, const Ring* ring, int64_t actor) {
  const RingMemory m(*host, *ring);
  uint32_t next = 0;
  for (int64_t at = 0; at < kDepth; ++at) {
    for (int64_t n = 0; n < m.max_items(); ++n) m.done(actor, at)[n].store(next++);
  }
  for (int64_t t = 0; t < kThreads; ++t) m.own(actor)[t].store(next++);
  // Seen before anything that is then written to these memories.
  std::atomic_thread_fence(std::memory_order_seq_cst);
}

// Answers tickets for `ns` as actor number `actor`, from the thread of it that has this number.
// 0; 1: memory ran out; 2: the ring is closing.
VLLM_SPARSE_API int vllm_sparse_ring_serve(const Host* host, const Ring* ring, int64_t actor,
                                           int64_t thread, int64_t ns) {
  if (thread < 0 || thread >= kThreads) return 2;
  const Host& h = *host;
  const RingMemory m(h, *ring);
  RingHead* head = m.head();
  static thread_local Scratch memory;
  const int64_t end = now_ns() + ns;
  uint32_t seen = 0;
  try {
    for (;;) {
      if (head->closing.load(std::memory_order_acquire) != 0) return 2;
      m.actor(actor)->beat.fetch_add(1, std::memory_order_relaxed);
      const uint32_t newest = head->published.load(std::memory_order_seq_cst);
      if (newest != seen) {
        for (int64_t at = 0; at < kDepth; ++at) serve_slot(h, m, actor, thread, at, &memory);
        seen = newest;
        continue;
      }
      const auto more = [&] { return head->published.load(std::memory_order_acquire) != seen; };
      if (spin(ring->spin_ns, more)) continue;
      const int64_t left = end - now_ns();
      if (left <= 0) return 0;
      head->parked.fetch_add(1, std::memory_order_seq_cst);
      if (!more() && head->closing.load(std::memory_order_seq_cst) == 0) {
        futex_wait(&head->published, seen, left);
      }
      head->parked.fetch_sub(1, std::memory_order_seq_cst);
    }
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

VLLM_SPARSE_API int64_t vllm_sparse_ring_beat(const Host* host, const Ring* ring, int64_t actor) {
  return static_cast<int64_t>(RingMemory(*host, *ring).actor(actor)->beat.load());
}

VLLM_SPARSE_API int64_t vllm_sparse_ring_items(const Host* host, const Ring* ring, int64_t actor) {
  return static_cast<int64_t>(RingMemory(*host, *ring).actor(actor)->items.load());
}

// Nanoseconds that an actor has spent on answers.
VLLM_SPARSE_API int64_t vllm_sparse_ring_busy_ns(const Host* host, const Ring* ring,
                                                 int64_t actor) {
  return static_cast<int64_t>(RingMemory(*host, *ring).actor(actor)->busy_ns.load());
}

// Tells all who serve to stop.
VLLM_SPARSE_API void vllm_sparse_ring_close(const Host* host, const Ring* ring) {
  RingHead* head = RingMemory(*host, *ring).head();
  head->closing.store(1, std::memory_order_seq_cst);
  futex_wake(&head->published);
}
