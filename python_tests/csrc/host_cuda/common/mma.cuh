// csrc/common/mma.cuh on the CPU: a warp's threads lay open what each holds, and each computes its share, by the
// layouts of the PTX instructions. Found before the other one, whose PTX needs a GPU.
#pragma once

#include <cuda_runtime.h>  // host_cuda's

#include "common/float16.h"

namespace sphinx {

struct Fragments {
  uint32_t a[32][4], b[32][2];
  const void* rows[32];
};
inline Fragments fragments[32][2];  // of the warps, at the places in turn

template <class T>
float element_of(uint32_t word, int which) {
  return to_float(T{static_cast<uint16_t>(word >> 16 * which)});
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = threadIdx.x % 32, group = lane / 4, within = lane % 4;
  Fragments& all = fragments[threadIdx.x / 32][next_place()];
  std::memcpy(all.a[lane], a, sizeof(a));
  all.b[lane][0] = b0, all.b[lane][1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const unsigned row = group + 8 * (i / 2), column = 2 * within + i % 2;
    double sum = sums[i];
    for (unsigned k = 0; k < 16; ++k) {
      // Element (row, k) of a, and (k, column) of b.
      const uint32_t left = all.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const uint32_t right = all.b[column * 4 + k % 8 / 2][k / 8];
      sum += static_cast<double>(element_of<T>(left, k % 2)) * element_of<T>(right, k % 2);
    }
    sums[i] = static_cast<float>(sum);
  }
}

inline void load_transposed(uint32_t (&matrices)[4], const void* row) {
  const unsigned lane = threadIdx.x % 32, group = lane / 4, within = lane % 4;
  Fragments& all = fragments[threadIdx.x / 32][next_place()];
  expect_aligned(row, 16);
  all.rows[lane] = row;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](unsigned k) { return static_cast<const uint16_t*>(all.rows[8 * i + k])[group]; };
    matrices[i] = at(2 * within) | static_cast<uint32_t>(at(2 * within + 1)) << 16;
  }
}

// Copies arrive as late as they may.
struct Copy {
  void* to;
  const void* from;
};
inline thread_local std::vector<Copy> copies;

inline void copy_async(void* to, const void* from, bool there) {
  expect_aligned(to, 16);
  if (there) expect_aligned(from, 16);
  copies.push_back({to, there ? from : nullptr});
}
inline void wait_for_copies() {
  for (const Copy& copy : copies) {
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  copies.clear();
}

template <class T>
uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

}  // namespace sphinx
