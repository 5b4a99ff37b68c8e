#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

#include "scratch.h"

namespace vllm_sparse {
namespace {

struct Job {
  const std::function<void(int64_t, float*)>* task = nullptr;
  std::atomic<int64_t> next{0};  // counts down
};

class Pool {
 public:
  Pool(int count, const int* cpus) : scratch_(count) {
    threads_.reserve(count - 1);
    for (int i = 1; i < count; ++i) {
      try {
        threads_.emplace_back([this, i] { serve(i); });
      } catch (...) {  // the system has no thread more
        end();
        throw;
      }
#if defined(__linux__)
      if (cpus != nullptr) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpus[i], &set);
        // Best effort: a CPU that the container does not grant leaves the thread where it is.
        pthread_setaffinity_np(threads_.back().native_handle(), sizeof(set), &set);
      }
#else
      (void)cpus;
#endif
    }
  }

  ~Pool() { end(); }

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  bool run(int64_t count, size_t scratch_floats,
           const std::function<void(int64_t, float*)>& task) {
    for (Scratch& scratch : scratch_) {
      if (scratch.at_least(scratch_floats) == nullptr && scratch_floats > 0) return false;
    }
    job_.task = &task;
    job_.next.store(count, std::memory_order_relaxed);
    if (threads_.empty() || count <= 1) {
      work(scratch_floats, 0);
      return true;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      floats_ = scratch_floats;
      busy_ = static_cast<int>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    work(scratch_floats, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    return true;
  }

 private:
  void end() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void work(size_t floats, int thread) {
    float* scratch = scratch_[thread].at_least(floats);
    for (;;) {
      const int64_t index = job_.next.fetch_sub(1, std::memory_order_relaxed) - 1;
      if (index < 0) return;
      (*job_.task)(index, scratch);
    }
  }

  void serve(int thread) {
    uint64_t seen = 0;
    for (;;) {
      size_t floats;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        floats = floats_;
      }
      work(floats, thread);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<Scratch> scratch_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job job_;
  uint64_t generation_ = 0;
  size_t floats_ = 0;
  int busy_ = 0;
  bool stop_ = false;
};

std::mutex g_mutex;  // one caller at a time: the pool belongs to the process
std::unique_ptr<Pool> g_pool;

// A child that is forked has the pool without its threads: it would wait for them for ever, where it
// ends as well, or for a lock that another thread of its parent held.
const bool g_forks = [] {
#if defined(__linux__)
  pthread_atfork([] { g_mutex.lock(); }, [] { g_mutex.unlock(); },
                 [] {
                   g_pool.release();
                   g_mutex.unlock();
                 });
#endif
  return true;
}();

Pool& pool() {
  if (g_pool == nullptr) g_pool = std::make_unique<Pool>(1, nullptr);
  return *g_pool;
}

}  // namespace

void set_threads(int count, const int* cpus) {
  std::lock_guard<std::mutex> lock(g_mutex);
  g_pool.reset();  // the new threads take the place of the old
  g_pool = std::make_unique<Pool>(count, cpus);
}

int num_threads() {
  std::lock_guard<std::mutex> lock(g_mutex);
  return pool().size();
}

bool parallel_for(int64_t count, size_t scratch_floats,
                  const std::function<void(int64_t, float*)>& task) {
  std::lock_guard<std::mutex> lock(g_mutex);
  return pool().run(count, scratch_floats, task);
}

}  // namespace vllm_sparse
