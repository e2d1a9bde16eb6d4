// Enough of CUDA's language for a C++ compiler to run this project's kernels on the CPU, a thread at a time: every
// block has one thread, so __syncthreads() has nobody to wait for. It tests indices and arithmetic, not races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
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
inline Dim3 blockIdx{0, 0, 0}, gridDim{1, 1, 1};
constexpr Dim3 threadIdx{0, 0, 0}, blockDim{1, 1, 1};
inline void __syncthreads() {}

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

// Dynamic shared memory, filled with garbage before every block: nothing may be read before it is written.
inline unsigned char* shared_on_host = nullptr;
#define SPHINX_DYNAMIC_SHARED(name) unsigned char* name = shared_on_host

// Runs a kernel over a grid of blocks with `shared` bytes of dynamic shared memory; true when nothing past them was
// written.
template <class Kernel, class Arguments>
bool launch_on_host(Dim3 grid, size_t shared, Kernel kernel, const Arguments& arguments) {
  constexpr size_t kGuard = 4096;
  std::vector<double> memory((shared + kGuard) / sizeof(double) + 2);
  shared_on_host = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  std::memset(shared_on_host + shared, 0x5a, kGuard - 16);
  gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      std::memset(shared_on_host, 0xa5, shared);
      kernel(arguments);
    }
  }
  for (size_t i = 0; i < kGuard - 16; ++i) {
    if (shared_on_host[shared + i] != 0x5a) return false;
  }
  return true;
}
