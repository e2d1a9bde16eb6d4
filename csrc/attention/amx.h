// The tiles of AMX: eight registers of up to 16 rows of 64 bytes, and their product. Tiles are numbered at compile
// time. Written as assembly: the compilers' own macros take digits only, no constants of a template, and those of GCC
// 12 do not say that memory is read, so that what was just written may come too late.
#pragma once

#include <cstdint>

namespace sphinx::attention {
namespace {
namespace amx {

// Before any other; all tiles become 0.
inline void configure(const void* config) {
  __asm__ volatile("ldtilecfg (%0)" ::"r"(config) : "memory");
}

// After all others: a thread whose tiles are in use costs more to switch.
inline void release() {
  __asm__ volatile("tilerelease" ::: "memory");
}

template <int kTo>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTo));
}

// Rows lie `step` bytes apart.
template <int kTo>
inline void load(const void* from, int64_t step) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(kTo) : "memory");
}

template <int kFrom>
inline void store(void* to, int64_t step) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(kFrom) : "memory");
}

// to[m][n] += sum over k of left[m][2 k] * right[k][2 n] + left[m][2 k + 1] * right[k][2 n + 1]: bfloat16, summed in
// float32. Numbers too small to be normal count as 0.
template <int kTo, int kLeft, int kRight>
inline void multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kLeft), "i"(kRight));
}

}  // namespace amx
}  // namespace
}  // namespace sphinx::attention
