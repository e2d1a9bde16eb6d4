// Vector loads and stores: N values of T in one instruction where the address allows it.
#pragma once

#include <cstdint>

namespace sphinx {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T value[N];
};

// Reads the first `count` <= N values from `from`; the others are left as they are.
template <class T, int N>
__device__ __forceinline__ void load(const T* from, Vec<T, N>& values, int count) {
  if (count == N && reinterpret_cast<uintptr_t>(from) % sizeof(values) == 0) {
    values = *reinterpret_cast<const Vec<T, N>*>(from);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) values.value[i] = from[i];
  }
}

// Writes the first `count` <= N of `values` to `to`.
template <class T, int N>
__device__ __forceinline__ void store(T* to, const Vec<T, N>& values, int count) {
  if (count == N && reinterpret_cast<uintptr_t>(to) % sizeof(values) == 0) {
    *reinterpret_cast<Vec<T, N>*>(to) = values;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) to[i] = values.value[i];
  }
}

}  // namespace sphinx
