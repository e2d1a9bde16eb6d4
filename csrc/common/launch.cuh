// Around a launch: the tensor's device is made current and restored, and a failed launch throws.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "common/check.h"

namespace sphinx {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(concat(what, ": ", cudaGetErrorString(status)));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

constexpr int kBlock = 256;

// Blocks for a grid-stride loop over `count` items: enough to fill any GPU, never more than a grid may have.
inline unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(std::clamp<int64_t>((count + kBlock - 1) / kBlock, 1, 1 << 16));
}

// Shared memory whose size the launch decides.
#ifndef SPHINX_DYNAMIC_SHARED
#define SPHINX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define SPHINX_FOR_EACH(index, count)                                                                \
  for (int64_t index = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; index < (count); \
       index += static_cast<int64_t>(gridDim.x) * blockDim.x)

}  // namespace sphinx
