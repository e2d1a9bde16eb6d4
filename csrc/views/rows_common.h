// The loops of rows.h that all instruction sets share, written once over a vector type V of common/simd.h. Included by
// rows_*.cpp, each compiled for its instruction set; everything here has internal linkage, so that no function compiled
// for one set can stand in for another.
#pragma once

#include "common/simd.h"
#include "views/math.h"
#include "views/rows.h"

namespace sphinx::views {
namespace {

// (u8 / 255 - mean) / std.
template <class V>
struct Normalise {
  using F = typename V::F;
  F white = V::set(255.0f), white_inverse = V::set(1 / 255.0f), mean, std, std_inverse;

  explicit Normalise(int c)
      : mean(V::set(clip_mean(c))), std(V::set(clip_std(c))), std_inverse(V::set(1 / clip_std(c))) {}
  F operator()(F value) const {
    return V::divide(V::sub(V::divide(value, white, white_inverse), mean), std, std_inverse);
  }
};

// (x * clip_std + clip_mean - mean) / std, constants and every result rounded to T.
template <class V, class T>
struct Renormalise {
  using F = typename V::F;
  F clip_std_, clip_mean_, mean, std, std_inverse;

  explicit Renormalise(int c)
      : clip_std_(constant(clip_std(c))),
        clip_mean_(constant(clip_mean(c))),
        mean(constant(dinov2_mean(c))),
        std(constant(dinov2_std(c))),
        std_inverse(V::set(1 / sphinx::rounded<T>(dinov2_std(c)))) {}
  F operator()(F x) const {
    x = V::template rounded<T>(V::mul(x, clip_std_));
    x = V::template rounded<T>(V::add(x, clip_mean_));
    x = V::template rounded<T>(V::sub(x, mean));
    return V::divide(x, std, std_inverse);
  }

 private:
  static F constant(float value) { return V::set(sphinx::rounded<T>(value)); }
};

// A plane's next row is written while the next canvas row is made. Each plane lies in pages of its own, too many for
// the processor to foresee: told of it a row ahead, it has the line ready (up to a quarter of the whole time).
template <class T>
inline void next_row(const T* row, int count) {
  __builtin_prefetch(row + count, 1);
}

template <class V, class T>
void pixels_from(int begin, const uint8_t* row, int c, int count, T* clip, T* dinov2) {
  const Normalise<V> normalise(c);
  const Renormalise<V, T> renormalise(c);
  int x = begin;
  for (; x + V::kWidth <= count; x += V::kWidth) {
    const typename V::F value = normalise(V::pixels(row + x));
    next_row(clip + x, count);
    V::store(clip + x, value);
    if (dinov2) {
      next_row(dinov2 + x, count);
      V::store(dinov2 + x, renormalise(V::template rounded<T>(value)));
    }
  }
  if (x < count) pixels_from<Lane, T>(x, row, c, count, clip, dinov2);
}

template <class V, class T>
void through_half_from(int begin, const uint8_t* row, int c, int count, T* result) {
  const Normalise<V> normalise(c);
  int x = begin;
  for (; x + V::kWidth <= count; x += V::kWidth) {
    next_row(result + x, count);
    V::store(result + x, V::template rounded<Half>(normalise(V::pixels(row + x))));
  }
  if (x < count) through_half_from<Lane, T>(x, row, c, count, result);
}

template <class V, class T>
void renormalise_from(int begin, const T* clip, int c, int count, T* result) {
  const Renormalise<V, T> renormalise(c);
  int x = begin;
  for (; x + V::kWidth <= count; x += V::kWidth) V::store(result + x, renormalise(V::load(clip + x)));
  if (x < count) renormalise_from<Lane, T>(x, clip, c, count, result);
}

// The vertical four taps, in the order of four_taps.
template <class V, class T>
void filter_column_from(int begin, const float* const* lines, const float* weights, int count, T* result) {
  typename V::F weight[4];
  for (int k = 0; k < 4; ++k) weight[k] = V::set(weights[k]);
  int x = begin;
  for (; x + V::kWidth <= count; x += V::kWidth) {
    typename V::F sum = V::mul(V::load(lines[1] + x), weight[1]);
    sum = V::fma(V::load(lines[0] + x), weight[0], sum);
    sum = V::fma(V::load(lines[2] + x), weight[2], sum);
    sum = V::fma(V::load(lines[3] + x), weight[3], sum);
    V::store(result + x, V::template rounded<Half>(sum));
  }
  if (x < count) filter_column_from<Lane, T>(x, lines, weights, count, result);
}

template <class V>
void filter_row_from(int begin, const float* pixels, const FourTapsRow& taps, float* result) {
  int x = begin;
  for (; x + V::kWidth <= taps.count; x += V::kWidth) {
    const auto product = [&](int k) { return V::gather(pixels, taps.index[k] + x); };
    typename V::F sum = V::mul(product(1), V::load(taps.weight[1] + x));
    sum = V::fma(product(0), V::load(taps.weight[0] + x), sum);
    sum = V::fma(product(2), V::load(taps.weight[2] + x), sum);
    V::store(result + x, V::fma(product(3), V::load(taps.weight[3] + x), sum));
  }
  if (x < taps.count) filter_row_from<Lane>(x, pixels, taps, result);
}

template <class V>
void split_row_from(int begin, const uint8_t* row, int c, int count, float* even, float* odd) {
  const Normalise<V> normalise(c);
  int x = begin;
  for (; x + V::kWidth <= count; x += V::kWidth) {
    typename V::F left, right;
    V::even_odd(row + 2 * x, left, right);
    V::store(even + x, V::template rounded<Half>(normalise(left)));
    V::store(odd + x, V::template rounded<Half>(normalise(right)));
  }
  if (x < count) split_row_from<Lane>(x, row, c, count, even, odd);
}

// At ratio 2: even and odd pixels apart, each with its neighbour repeated at the border, so that the four taps are four
// plain loads and their weights constants. Sums of fp16 values times multiples of 1/32 are exact, in any order.
template <class V>
void filter_row_by_2_from(int begin, const float* even, const float* odd, int count, float* result) {
  const typename V::F outer = V::set(-3.0f / 32), inner = V::set(19.0f / 32);
  int x = begin;
  for (; x + V::kWidth <= count; x += V::kWidth) {
    typename V::F sum = V::mul(V::load(even + x), inner);
    sum = V::fma(V::load(odd + x - 1), outer, sum);
    sum = V::fma(V::load(odd + x), inner, sum);
    V::store(result + x, V::fma(V::load(even + x + 1), outer, sum));
  }
  if (x < count) filter_row_by_2_from<Lane>(x, even, odd, count, result);
}

template <class V>
void filter_row(const uint8_t* row, int c, int extent, const FourTapsRow& taps, float* scratch, float* result) {
  if (extent == 2 * taps.count) {
    float *const even = scratch, *const odd = scratch + taps.count + 2;  // even[count] and odd[-1] exist
    split_row_from<V>(0, row, c, taps.count, even, odd);
    odd[-1] = even[0];
    even[taps.count] = odd[taps.count - 1];
    filter_row_by_2_from<V>(0, even, odd, taps.count, result);
  } else {
    through_half_from<V>(0, row, c, extent, scratch);
    filter_row_from<V>(0, scratch, taps, result);
  }
}

// row[index[x]] for each x.
template <class V>
void pick(const uint8_t* row, const Nearest& nearest, uint8_t* result) {
  int x = 0;
#ifdef __SSSE3__
  if (nearest.masks) {
    for (; x + 16 <= nearest.count; x += 16) {
      const auto load = [](const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
      const __m128i picked = _mm_shuffle_epi8(load(row + nearest.index[x]), load(nearest.masks + x));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(result + x), picked);
    }
  }
#endif
  for (; x < nearest.count; ++x) result[x] = row[nearest.index[x]];
}

template <class V, class T>
void pick_from(const T* row, int extent, const Nearest& nearest, T* result) {
  int x = 0;
  if constexpr (sizeof(T) == 4) {
    for (; x + V::kWidth <= nearest.count; x += V::kWidth) {
      const int32_t* const index = nearest.index + x;
      const int last = extent - V::kWidth, base = index[0] < last ? index[0] : last;
      const bool near = last >= 0 && index[V::kWidth - 1] - base < V::kWidth;  // they come from as many neighbours
      const typename V::F values = near ? V::permute(row + base, index, base) : V::gather(row, index);
      next_row(result + x, nearest.count);
      V::store(result + x, V::template rounded<Half>(values));
    }
    for (; x < nearest.count; ++x) result[x] = rounded<Half>(row[nearest.index[x]]);
  } else {
    for (; x < nearest.count; ++x) result[x] = row[nearest.index[x]];
  }
}

template <class V, class T>
Emit make_emit() {
  return {
      [](const uint8_t* row, int c, int count, void* clip, void* dinov2) {
        pixels_from<V>(0, row, c, count, static_cast<T*>(clip), static_cast<T*>(dinov2));
      },
      [](const uint8_t* row, int c, int count, void* result) {
        through_half_from<V>(0, row, c, count, static_cast<T*>(result));
      },
      [](const void* clip, int c, int count, void* result) {
        renormalise_from<V>(0, static_cast<const T*>(clip), c, count, static_cast<T*>(result));
      },
      [](const float* const* lines, const float* weights, int count, void* result) {
        filter_column_from<V>(0, lines, weights, count, static_cast<T*>(result));
      },
      [](const void* row, int extent, const Nearest& nearest, void* result) {
        pick_from<V>(static_cast<const T*>(row), extent, nearest, static_cast<T*>(result));
      },
  };
}

}  // namespace
}  // namespace sphinx::views
