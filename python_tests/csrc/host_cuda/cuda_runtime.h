// Enough of CUDA's language for a C++ compiler to run this project's kernels on the CPU: a block is a few threads that
// meet at __syncthreads(), blocks follow one another. It tests indices, arithmetic and, under ThreadSanitizer, races.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __CUDACC__
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x, y, z;
};
inline thread_local Dim3 blockIdx{0, 0, 0}, threadIdx{0, 0, 0};
inline Dim3 gridDim{1, 1, 1}, blockDim{1, 1, 1};

// Threads are many and meet often: they do not sleep.
class Barrier {
 public:
  void wait(unsigned threads) {
    const unsigned round = round_.load(std::memory_order_acquire);
    if (here_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      here_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      while (round_.load(std::memory_order_acquire) == round) std::this_thread::yield();
    }
  }

 private:
  std::atomic<unsigned> here_{0}, round_{0};
};
inline Barrier block_barrier, warp_barriers[32];
inline void __syncthreads() {
  block_barrier.wait(blockDim.x);
}

inline void __syncwarp() {
  warp_barriers[threadIdx.x / 32].wait(32);
}

// What a warp's threads show each other lies in one of two places in turn: nobody writes to a place again before all
// have met once more, and so have read it.
inline uint32_t warp_words[32][2][32];
inline thread_local unsigned exchanges = 0;  // of this thread, in this launch
inline unsigned next_place() {
  return exchanges++ % 2;
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  static_assert(sizeof(T) == 4);
  uint32_t* const words = warp_words[threadIdx.x / 32][next_place()];
  std::memcpy(&words[threadIdx.x % 32], &value, 4);
  __syncwarp();
  std::memcpy(&value, &words[lane % 32], 4);
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

inline int atomicAdd(int* to, int value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
inline void __threadfence() {}

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

// A GPU faults at an address that is not aligned; so does this.
inline void expect_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) std::abort();
}
template <class T>
T __ldcg(const T* from) {
  expect_aligned(from, sizeof(T));
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
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
// past them was written. `order`: the blocks, numbered along x first; without it one after another.
template <class Kernel, class Arguments>
bool launch_on_host(Dim3 grid, unsigned threads, size_t shared, Kernel kernel, const Arguments& arguments,
                    const std::vector<unsigned>& order = {}) {
  constexpr size_t kGuard = 4096;
  std::vector<double> memory((shared + kGuard) / sizeof(double) + 2);
  shared_on_host = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  std::memset(shared_on_host + shared, 0x5a, kGuard - 16);
  gridDim = grid;
  blockDim = {threads, 1, 1};
  const auto run = [&](unsigned thread) {
    threadIdx = {thread, 0, 0};
    exchanges = 0;
    for (unsigned turn = 0; turn < grid.x * grid.y; ++turn) {
      const unsigned block = order.empty() ? turn : order[turn];
      blockIdx = {block % grid.x, block / grid.x, 0};
      __syncthreads();
      if (thread == 0) std::memset(shared_on_host, 0xff, shared);
      __syncthreads();
      kernel(arguments);
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
