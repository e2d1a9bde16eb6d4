// Enough of CUDA's language for a C++ compiler to run this project's kernels on the CPU: a block is a few threads that
// meet at __syncthreads(), blocks follow one another. It tests indices, arithmetic and, under ThreadSanitizer, races.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#define __CUDACC__
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)

struct Dim3 {
  unsigned x, y, z;
};
inline thread_local Dim3 blockIdx{0, 0, 0}, threadIdx{0, 0, 0};
inline Dim3 gridDim{1, 1, 1}, blockDim{1, 1, 1};

class Barrier {
 public:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    if (++here_ == blockDim.x) {
      here_ = 0;
      ++round_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  unsigned here_ = 0, round_ = 0;
};
inline Barrier block_barrier;
inline void __syncthreads() {
  block_barrier.wait();
}

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaGetDevice(int* device) {
  return *device = 0;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

// Dynamic shared memory, filled with garbage before every block, nan as floats: nothing may be read before it is
// written.
inline unsigned char* shared_on_host = nullptr;
#define SPHINX_DYNAMIC_SHARED(name) unsigned char* name = shared_on_host

// Runs a kernel over a grid of blocks of `threads`, with `shared` bytes of dynamic shared memory; true when nothing
// past them was written.
template <class Kernel, class Arguments>
bool launch_on_host(Dim3 grid, unsigned threads, size_t shared, Kernel kernel, const Arguments& arguments) {
  constexpr size_t kGuard = 4096;
  std::vector<double> memory((shared + kGuard) / sizeof(double) + 2);
  shared_on_host = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  std::memset(shared_on_host + shared, 0x5a, kGuard - 16);
  gridDim = grid;
  blockDim = {threads, 1, 1};
  const auto run = [&](unsigned thread) {
    threadIdx = {thread, 0, 0};
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, 0};
        __syncthreads();
        if (thread == 0) std::memset(shared_on_host, 0xff, shared);
        __syncthreads();
        kernel(arguments);
      }
    }
  };
  std::vector<std::thread> helpers;
  for (unsigned thread = 1; thread < threads; ++thread) helpers.emplace_back(run, thread);
  run(0);
  for (std::thread& helper : helpers) helper.join();
  for (size_t i = 0; i < kGuard - 16; ++i) {
    if (shared_on_host[shared + i] != 0x5a) return false;
  }
  return true;
}
