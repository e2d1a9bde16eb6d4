// Rows over threads. Threads live for one call: nothing survives a fork, and nothing is shared between callers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace sphinx {

// Calls f(begin, end) over disjoint chunks of `grain` items that cover [0, count), on at most `threads` threads, the
// caller's among them. The chunks do not depend on `threads`, so neither does a result. The first exception is
// rethrown.
template <class F>
void parallel_for(int64_t count, int64_t grain, int threads, F&& f) {
  if (count <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t chunks = (count - 1) / grain + 1;
  const int64_t workers = std::min<int64_t>(std::max(threads, 1), chunks);

  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    try {
      for (int64_t chunk; (chunk = next++) < chunks;) f(chunk * grain, std::min(count, (chunk + 1) * grain));
    } catch (...) {
      next = chunks;
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };

  std::vector<std::thread> helpers;
  helpers.reserve(workers - 1);
  try {
    for (int64_t i = 1; i < workers; ++i) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that run, and this one, do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace sphinx
