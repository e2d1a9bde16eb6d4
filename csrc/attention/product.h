// The one matrix product of the room on the CPU: few rows, both operands near.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention/ahead.h"
#include "attention/math.h"
#include "common/simd.h"

namespace sphinx::attention {
namespace {

// Sums that are kept in registers together, beside what is multiplied.
template <class V>
struct Tile {
  static constexpr int kRows = V::kWidth == 16 ? 6 : V::kWidth == 8 ? 3 : 2;
  static constexpr int kVectors = 4;
};

constexpr int64_t kDeep = 4;  // steps in depth between two times memory is asked for

struct Left {
  const float* at;
  int64_t step;  // from one row to the next
};

enum class Start { zero, add, keep };  // from 0, c, c * keep

// c[m][n] = start + sum over k of left[m][k] * right[k][n], kM rows and kN vectors of n. The start is added last: a sum
// over many tiles is rounded as a sum of sums.
template <class V, int kM, int kN, class T>
inline void product_tile(Left left, const T* right, int64_t right_step, int64_t depth, float* c, int64_t c_step,
                         Start start, const float* keep, Ahead& ahead) {
  typename V::F sum[kM][kN];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) sum[m][n] = V::set(0);
  }
  Ahead asked = ahead;  // in registers
  const float* factor = left.at;
  for (int64_t k = 0; k < depth; ++k) {
    if (k % kDeep == 0) asked.ask();
    typename V::F own[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) own[n] = V::load(right + n * V::kWidth);
    right += right_step;
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const typename V::F own_factor = V::set(factor[m * left.step]);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) sum[m][n] = V::fma(own_factor, own[n], sum[m][n]);
    }
    ++factor;
  }
  ahead = asked;
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    const typename V::F kept = V::set(start == Start::keep ? keep[m] : 1.0f);
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      float* const to = c + m * c_step + n * V::kWidth;
      V::store(to, start == Start::zero ? sum[m][n] : V::fma(V::load(to), kept, sum[m][n]));
    }
  }
}

// Calls f with `count`, 1 to kMost, as a constant.
template <int kMost, class F>
inline void as_constant(int64_t count, F&& f) {
  if constexpr (kMost > 1) {
    if (count < kMost) return as_constant<kMost - 1>(count, f);
  }
  f(std::integral_constant<int, kMost>{});
}

// The same for any number of rows, and of columns in whole vectors.
template <class V, class T>
inline void product(int64_t rows, int64_t columns, Left left, const T* right, int64_t right_step, int64_t depth,
                    float* c, int64_t c_step, Start start, const float* keep, Ahead& ahead) {
  constexpr int kRows = Tile<V>::kRows, kVectors = Tile<V>::kVectors;
  for (int64_t column = 0; column < columns; column += kVectors * V::kWidth) {
    as_constant<kVectors>(std::min<int64_t>(kVectors, (columns - column) / V::kWidth), [&](auto vectors) {
      for (int64_t row = 0; row < rows;) {
        const int64_t now = ceil_div(rows - row, ceil_div(rows - row, kRows));  // 8 rows are 4 and 4, not 6 and 2
        as_constant<kRows>(now, [&](auto count) {
          product_tile<V, decltype(count)::value, decltype(vectors)::value>(
              {left.at + row * left.step, left.step}, right + column, right_step, depth, c + row * c_step + column,
              c_step, start, keep ? keep + row : nullptr, ahead);
        });
        row += now;
      }
    });
  }
}

}  // namespace
}  // namespace sphinx::attention
