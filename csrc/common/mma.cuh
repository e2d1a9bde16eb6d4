// Tensor cores and what feeds them, as functions: each is one PTX instruction of sm_80. Matrices are 16 bit, packed in
// pairs: the element that comes first in the matrix lies in the low half of a word. In a warp g = lane / 4, t = lane
// % 4.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/float16.h"

namespace sphinx {

// sums[16, 8] += a[16, 16] * b[16, 8] over a warp, in float32. A thread holds of
//   a: row g, columns 2 t and 2 t + 1; row g + 8, the same; row g, columns 2 t + 8 and 2 t + 9; row g + 8, the same
//   b: column g, rows 2 t and 2 t + 1; the same, rows 2 t + 8 and 2 t + 9
//   sums: row g, columns 2 t and 2 t + 1; row g + 8, the same
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 matrices out of shared memory, transposed: thread 8 i + k gives the address of row k of matrix i, 16 bytes
// aligned to 16, and gets rows 2 t and 2 t + 1 of column g of every matrix.
__device__ __forceinline__ void load_transposed(uint32_t (&matrices)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// 16 bytes on their way from global to shared memory, both aligned to 16; zeros, and nothing is read, unless `there`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

// All of this thread's copies have arrived; the others see them after a barrier.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Two floats rounded to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  uint32_t both;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  }
  return both;
}

}  // namespace sphinx
