// Sums over a block.
#pragma once

#include "common/host_device.h"

namespace sphinx {

// The sum of `value` over the threads of a block, known to all of them, in an order that depends on their number alone,
// which must be a power of two. `scratch`: a float for each thread in shared memory; free again when this returns.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  const float sum = scratch[0];
  __syncthreads();
  return sum;
}

}  // namespace sphinx
