// Accumulators of mma and wgmma -> rows of memory. In both, a thread holds pairs: columns 2q and 2q + 1 of a block of
// eight columns, where q is the thread's place among four neighbours that share a row.
#pragma once

#include <cuda_runtime.h>

namespace sphinx::fusion::gemm {

// Threads 2i and 2i + 1 trade: the even one gets four neighbouring columns of the left block, the odd one of the right.
// A store of 16 bytes instead of two of 8 halves the store instructions. All threads of a warp call this together.
__device__ __forceinline__ float4 trade(float2 left, float2 right) {
  const bool odd = threadIdx.x & 1;
  const float2 give = odd ? left : right;
  const float x = __shfl_xor_sync(0xffffffffu, give.x, 1), y = __shfl_xor_sync(0xffffffffu, give.y, 1);
  return odd ? make_float4(x, y, right.x, right.y) : make_float4(left.x, left.y, x, y);
}

// The first column of what trade() returned, where this thread's pairs start at `left` and `right`.
__device__ __forceinline__ int traded_column(int left, int right) {
  return threadIdx.x & 1 ? right - 2 : left;
}

}  // namespace sphinx::fusion::gemm
