// Rows over threads: those of the OpenMP that torch has loaded, else our own.
//
// After an operation OpenMP's threads wait for the next one in a busy loop for a while. Threads of our own would share
// the processors with them; these are awake already. A forked child has lost them: there, and where no OpenMP is
// loaded, a team starts threads that live for one call.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <dlfcn.h>
#include <unistd.h>
#endif

#include "common/check.h"

namespace sphinx {

// OpenMP's way to run f(data) on `threads` threads at once; also exported by Intel's and LLVM's for Linux.
using RunParallel = void (*)(void (*f)(void*), void* data, unsigned threads, unsigned flags);

// That of the process, or NULL. First asked for when the module is loaded (module.cpp): that process owns its threads.
inline RunParallel loaded_openmp() {
#if defined(__unix__)
  static const auto found = reinterpret_cast<RunParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  static const pid_t owner = getpid();
  return getpid() == owner ? found : nullptr;
#else
  return nullptr;
#endif
}

// `threads` threads, the caller's among them, for several loops in a row. The others are started by the first loop that
// has work for them, and wait between loops.
class Team {
 public:
  explicit Team(int threads) : most_(std::max(threads, 1)) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  ~Team() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    wake_.notify_all();
    for (std::thread& helper : helpers_) helper.join();
  }

  // Calls f(begin, end) over disjoint chunks of `grain` items that cover [0, count). The chunks do not depend on the
  // number of threads, so neither does a result. The first exception is rethrown.
  template <class F>
  void each(int64_t count, int64_t grain, F&& f) {
    if (count <= 0) return;
    grain = std::max<int64_t>(grain, 1);
    const int64_t chunks = (count - 1) / grain + 1;
    if (most_ == 1 || chunks == 1) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) f(chunk * grain, std::min(count, (chunk + 1) * grain));
      return;
    }
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;
    const auto work = [&] {
      try {
        for (int64_t chunk; (chunk = next++) < chunks;) f(chunk * grain, std::min(count, (chunk + 1) * grain));
      } catch (...) {
        next = chunks;
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    };
    using Work = decltype(work);
    const auto threads = static_cast<unsigned>(std::min<int64_t>(most_, chunks));
    if (const RunParallel run_parallel = loaded_openmp()) {
      run_parallel([](void* data) { (*static_cast<Work*>(data))(); },
                   const_cast<void*>(static_cast<const void*>(&work)), threads, 0);
      if (error) std::rethrow_exception(error);
      return;
    }
    start(threads - 1);  // before `work` is shown to anybody: this may throw
    open([](const void* work) { (*static_cast<const Work*>(work))(); }, &work);
    work();
    close();
    if (error) std::rethrow_exception(error);
  }

 private:
  using Call = void (*)(const void*);

  void open(Call call, const void* work) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      call_ = call;
      work_ = work;
      ++loop_;
    }
    wake_.notify_all();
  }

  // Helpers that have not come yet stay away; the caller waits for those that have.
  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    call_ = nullptr;
    done_.wait(lock, [&] { return active_ == 0; });
  }

  void start(int64_t helpers) {
    try {
      while (static_cast<int64_t>(helpers_.size()) < helpers) helpers_.emplace_back([this] { help(); });
    } catch (const std::system_error&) {
      // The system gives no more threads: those that run, and the caller, do the work.
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0;;) {
      wake_.wait(lock, [&] { return stopped_ || (call_ && loop_ != seen); });
      if (stopped_) return;
      seen = loop_;
      ++active_;
      const Call call = call_;
      const void* const work = work_;
      lock.unlock();
      call(work);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  const int64_t most_;
  std::vector<std::thread> helpers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Call call_ = nullptr;  // the loop that is open, if one is
  const void* work_ = nullptr;
  uint64_t loop_ = 0;
  int active_ = 0;
  bool stopped_ = false;
};

inline int checked_threads(int64_t value) {
  check(value >= 1 && value <= 1024, "threads: expected 1 to 1024, got ", value);
  return static_cast<int>(value);
}

// One loop.
template <class F>
void parallel_for(int64_t count, int64_t grain, int threads, F&& f) {
  Team(threads).each(count, grain, f);
}

}  // namespace sphinx
