#include "src/cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

namespace punica::cpu {
namespace {

// One parallel_for. Lives on the caller's stack: the caller leaves only after every participant has left work().
struct Job {
  detail::Task run;
  const void* body;
  int64_t num_tasks;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) run(body, task);
  }
};

// As condition.wait(lock, done), whose symbol is newer than all others that the library needs of libstdc++ (GCC 12):
// with it the wheel would not load where that is older, as on RHEL 9. Timed waits are in the header.
template <class Done>
void wait(std::condition_variable& condition, std::unique_lock<std::mutex>& lock, Done done) {
  while (!condition.wait_for(lock, std::chrono::hours(1), done)) {
  }
}

// Threads that sleep until a job comes. One job at a time; a second caller does its own work alone.
class Pool {
 public:
  // False if the pool is busy with another caller's job.
  bool try_run(int num_threads, Job& job) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    const int helpers = std::min(num_threads - 1, grow(num_threads - 1));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = helpers;
      running_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    wait(done_, lock, [&] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  // Makes the pool at least `size` threads large if the system allows; returns its size.
  int grow(int size) {
    while (size_ < size) {
      try {
        // A new thread must not take part in jobs from before it: it starts from the generation of now.
        std::thread([this, index = size_, seen = generation_] { loop(index, seen); }).detach();
      } catch (const std::system_error&) {
        break;  // no more threads to be had: the ones that exist do the work
      }
      ++size_;
    }
    return size_;
  }

  void loop(int index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wait(wake_, lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (index >= wanted_) continue;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // held by the caller whose job runs; guards size_
  int size_ = 0;

  std::mutex mutex_;  // guards all below
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  int wanted_ = 0;   // threads of the pool that take part in the job
  int running_ = 0;  // of these, the ones that have not left it
  uint64_t generation_ = 0;
};

// Never destroyed: its threads may still sleep in it while the process exits.
std::atomic<Pool*> g_pool{nullptr};
std::atomic<bool> g_forked{false};

// Runs in the child of a fork. The threads of both pools are gone there, and their locks may be held for ever.
void on_fork_child() {
  g_pool.store(nullptr, std::memory_order_relaxed);
  g_forked.store(true, std::memory_order_relaxed);
}

Pool& pool() {
  Pool* current = g_pool.load(std::memory_order_acquire);
  if (current == nullptr) {
    Pool* created = new Pool;
    if (g_pool.compare_exchange_strong(current, created, std::memory_order_acq_rel)) return *created;
    delete created;  // another thread was faster; this one has no threads yet
  }
  return *current;
}

using GompParallel = void (*)(void (*fn)(void*), void* data, unsigned num_threads, unsigned flags);

// The entry point that GCC compiles `#pragma omp parallel` into; LLVM's and Intel's runtimes have it as well.
GompParallel find_gomp_parallel() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (symbol == nullptr) {
    if (void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(library, "GOMP_parallel");
  }
  return reinterpret_cast<GompParallel>(symbol);
}

int default_num_threads() {
  if (const char* text = std::getenv("PUNICA_NUM_THREADS")) {
    const int value = std::atoi(text);
    if (value > 0) return value;
  }
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) return std::max(1, CPU_COUNT(&cpus));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

int choose_num_threads(const Context& context, double nanoseconds) {
  // About twice what waking a pool costs.
  constexpr double kWorthwhile = 10e3;
  if (nanoseconds < kWorthwhile) return 1;
  static const int default_threads = default_num_threads();
  return context.num_threads > 0 ? context.num_threads : default_threads;
}

namespace detail {

void run_parallel(int num_threads, int64_t num_tasks, Task run, const void* body) {
  Job job{run, body, num_tasks};
  if (num_threads <= 1 || num_tasks <= 1) {
    job.work();
    return;
  }
  static const int fork_handler = pthread_atfork(nullptr, nullptr, on_fork_child);
  static const GompParallel gomp_parallel = find_gomp_parallel();
  if (gomp_parallel != nullptr && fork_handler == 0 && !g_forked.load(std::memory_order_relaxed)) {
    gomp_parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(num_threads), 0);
    return;
  }
  if (!pool().try_run(num_threads, job)) job.work();
}

}  // namespace detail
}  // namespace punica::cpu
