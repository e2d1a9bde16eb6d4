// Enough of CUDA's language for a C++ compiler to run this project's kernels on the CPU, a thread at a time: every
// block has one thread, so __syncthreads() has nobody to wait for. It tests indices and arithmetic, not races.
#pragma once

#define __CUDACC__
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __shared__ static

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

// Runs a kernel over `blocks` blocks.
template <class Kernel, class... Arguments>
void launch_on_host(unsigned blocks, Kernel kernel, Arguments... arguments) {
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) kernel(arguments...);
}
