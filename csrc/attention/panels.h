// Keys come as rows, one position after another, and are multiplied as columns: a panel holds up to 64
// elements of 64 positions, transposed and in float32, so that a vector is neighbouring positions.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention/product.h"
#include "common/simd.h"

namespace sphinx::attention {
namespace {

constexpr int64_t kTile = 64;   // positions
constexpr int64_t kChunk = 64;  // elements of a head

// Four 4-byte words of as many positions as V has lanes -> four vectors. `step` bytes lie between positions. Loads
// gather 128-bit blocks, so that block q holds position 4 q + j; the rest happens within the blocks. Blocks from
// kBlocks on are 0.
template <int kBlocks>
inline void four_words(const char* from, int64_t step, float (&to)[4]) {
  std::memcpy(to, from, sizeof(to));
}

#ifdef __AVX2__
inline __m128 four_floats(const char* from) {
  return _mm_loadu_ps(reinterpret_cast<const float*>(from));
}

template <int kBlocks>
inline void four_words(const char* from, int64_t step, __m256 (&to)[4]) {
  __m256 of[4];
  const char* const second = from + 4 * step;
  for (int j = 0; j < 4; ++j) {
    of[j] = _mm256_zextps128_ps256(four_floats(from + j * step));
    if constexpr (kBlocks > 1) of[j] = _mm256_insertf128_ps(of[j], four_floats(second + j * step), 1);
  }
  const __m256 low01 = _mm256_unpacklo_ps(of[0], of[1]), high01 = _mm256_unpackhi_ps(of[0], of[1]);
  const __m256 low23 = _mm256_unpacklo_ps(of[2], of[3]), high23 = _mm256_unpackhi_ps(of[2], of[3]);
  to[0] = _mm256_shuffle_ps(low01, low23, 0x44);
  to[1] = _mm256_shuffle_ps(low01, low23, 0xee);
  to[2] = _mm256_shuffle_ps(high01, high23, 0x44);
  to[3] = _mm256_shuffle_ps(high01, high23, 0xee);
}
#endif

#ifdef __AVX512F__
template <int kBlocks>
inline void four_words(const char* from, int64_t step, __m512 (&to)[4]) {
  __m512 of[4];
  const char *const second = from + 4 * step, *const third = second + 4 * step, *const fourth = third + 4 * step;
  for (int j = 0; j < 4; ++j) {
    of[j] = _mm512_zextps128_ps512(four_floats(from + j * step));
    if constexpr (kBlocks > 1) of[j] = _mm512_insertf32x4(of[j], four_floats(second + j * step), 1);
    if constexpr (kBlocks > 2) of[j] = _mm512_insertf32x4(of[j], four_floats(third + j * step), 2);
    if constexpr (kBlocks > 3) of[j] = _mm512_insertf32x4(of[j], four_floats(fourth + j * step), 3);
  }
  const __m512 low01 = _mm512_unpacklo_ps(of[0], of[1]), high01 = _mm512_unpackhi_ps(of[0], of[1]);
  const __m512 low23 = _mm512_unpacklo_ps(of[2], of[3]), high23 = _mm512_unpackhi_ps(of[2], of[3]);
  to[0] = _mm512_shuffle_ps(low01, low23, 0x44);
  to[1] = _mm512_shuffle_ps(low01, low23, 0xee);
  to[2] = _mm512_shuffle_ps(high01, high23, 0x44);
  to[3] = _mm512_shuffle_ps(high01, high23, 0xee);
}
#endif

// `elements` of one vector of positions, at `from` -> panel columns at `to`.
template <class V, class T, int kBlocks>
inline void fill_columns(const T* from, int64_t step, int64_t elements, float* to, int64_t to_step, Ahead& ahead) {
  constexpr int kEach = 4 / sizeof(T);  // elements in a word
  Ahead asked = ahead;
  for (int64_t e = 0; e < elements; e += 4 * kEach) {
    asked.ask();
    typename V::F words[4];
    four_words<kBlocks>(reinterpret_cast<const char*>(from + e), step * sizeof(T), words);
    for (int64_t w = 0; w < 4; ++w) {
      float* const column = to + (e + kEach * w) * to_step;
      if constexpr (kEach == 1) {
        V::store(column, words[w]);
      } else {
        V::store(column, V::even(words[w], T{}));
        V::store(column + to_step, V::odd(words[w], T{}));
      }
    }
  }
  ahead = asked;
}

// The elements [0, elements) of `count` <= kTile positions at `from`, `step` elements apart -> panel
// [elements][`count` rounded up to whole vectors]. Columns past `count` are 0: whatever else might be
// a number too small for the processor to multiply fast. A short panel is small: the first-level cache must hold it.
template <class V, class T>
inline void fill_panel(const T* from, int64_t step, int64_t count, int64_t elements, float* panel, Ahead& ahead) {
  constexpr int kWidth = V::kWidth, kMost = kWidth > 4 ? kWidth / 4 : 1;
  const int64_t whole = ceil_div(count, kWidth) * kWidth;
  int64_t first = 0;
  for (; first + kWidth <= count; first += kWidth) {
    fill_columns<V, T, kMost>(from + first * step, step, elements, panel + first, whole, ahead);
  }
  const int64_t left = count - first;
  if (!left) return;
  alignas(64) T rest[kWidth * kChunk];  // whole blocks, so that nothing is read that is not there
  const int64_t blocks_left = ceil_div(left, 4);
  for (int64_t i = 0; i < left; ++i) std::memcpy(rest + i * elements, from + (first + i) * step, elements * sizeof(T));
  std::fill(rest + left * elements, rest + 4 * blocks_left * elements, T{});
  as_constant<kMost>(blocks_left, [&](auto blocks) {
    fill_columns<V, T, decltype(blocks)::value>(rest, elements, elements, panel + first, whole, ahead);
  });
}

}  // namespace
}  // namespace sphinx::attention
