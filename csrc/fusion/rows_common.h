// The loops of rows.h, written once over a vector type V of common/simd.h. Included by rows_*.cpp, each compiled for
// its instruction set; everything here has internal linkage.
#pragma once

#include <cmath>

#include "common/simd.h"
#include "fusion/rows.h"

namespace sphinx::fusion {
namespace {

// Calls step(i, V{}) for whole vectors from `begin` on, then step(i, Lane{}) for what is left.
template <class V, class F>
inline void sweep(int64_t count, F&& step) {
  int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) step(i, V{});
  for (; i < count; ++i) step(i, Lane{});
}

// Sum over i of term(i, V{}), in four running sums, so that one addition need not wait for the last.
template <class V, class F>
inline float sum_over(int64_t count, F&& term) {
  constexpr int64_t kStep = 4 * V::kWidth;
  typename V::F sums[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (int k = 0; k < 4; ++k) sums[k] = V::add(sums[k], term(i + k * V::kWidth, V{}));
  }
  for (; i + V::kWidth <= count; i += V::kWidth) sums[0] = V::add(sums[0], term(i, V{}));
  float sum = V::sum(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  for (; i < count; ++i) sum += term(i, Lane{});
  return sum;
}

template <class V, class T, class S>
void add(const void* fine_row, const void* coarse_row, const void* bias_row, int64_t count, void* y_row) {
  const S *const fine = static_cast<const S*>(fine_row), *const coarse = static_cast<const S*>(coarse_row);
  const T* const bias = static_cast<const T*>(bias_row);
  T* const y = static_cast<T*>(y_row);
  if (fine && coarse) {
    sweep<V>(count, [&](int64_t i, auto v) {
      using W = decltype(v);
      W::store(y + i, W::add(W::add(W::load(fine + i), W::load(coarse + i)), W::load(bias + i)));
    });
  } else {
    const S* const sums = fine ? fine : coarse;
    sweep<V>(count, [&](int64_t i, auto v) {
      using W = decltype(v);
      W::store(y + i, W::add(W::load(sums + i), W::load(bias + i)));
    });
  }
}

// Mean first, then the squares of what differs from it: no cancellation. Where the mean is far from 0 its sum was
// rounded coarsely, and the mean of what differs from it corrects it. The row stays in the first-level cache.
template <class V, class T>
void normalise(const void* y_row, const void* weight_row, const void* shift_row, int64_t count, float eps,
               void* out_row, float* stats) {
  const T *const y = static_cast<const T*>(y_row), *const weight = static_cast<const T*>(weight_row);
  const T* const shift = static_cast<const T*>(shift_row);
  T* const out = static_cast<T*>(out_row);
  const auto mean_from = [&](float origin) {
    const auto difference = [&](int64_t i, auto v) {
      return decltype(v)::sub(decltype(v)::load(y + i), decltype(v)::set(origin));
    };
    return sum_over<V>(count, difference) / count;
  };
  const auto squares_from = [&](float origin) {
    return sum_over<V>(count, [&](int64_t i, auto v) {
      using W = decltype(v);
      const typename W::F difference = W::sub(W::load(y + i), W::set(origin));
      return W::mul(difference, difference);
    });
  };
  float mean = mean_from(0), squares = squares_from(mean);
  if (mean * mean * count > squares) {
    mean += mean_from(mean);
    squares = squares_from(mean);
  }
  const float rstd = 1 / std::sqrt(squares / count + eps);
  sweep<V>(count, [&](int64_t i, auto v) {
    using W = decltype(v);
    const typename W::F normal = W::mul(W::sub(W::load(y + i), W::set(mean)), W::set(rstd));
    W::store(out + i, W::fma(normal, W::load(weight + i), W::load(shift + i)));
  });
  stats[0] = mean;
  stats[1] = rstd;
}

// With n = (y - mean) * rstd and g = grad * weight: the gradient of y is rstd * (g - mean(g) - n * mean(g * n)).
template <class V, class T, class S>
void backward(const void* grad_row, const void* y_row, const float* stats, const void* weight_row, int64_t count,
              void* result_row, float* coarse, const ColumnSums& sums) {
  const T *const grad = static_cast<const T*>(grad_row), *const y = static_cast<const T*>(y_row);
  const T* const weight = static_cast<const T*>(weight_row);
  S* const result = static_cast<S*>(result_row);
  const float mean = stats[0], rstd = stats[1];
  const auto normal = [&](int64_t i, auto v) {
    using W = decltype(v);
    return W::mul(W::sub(W::load(y + i), W::set(mean)), W::set(rstd));
  };
  const auto weighted = [&](int64_t i, auto v) {
    using W = decltype(v);
    return W::mul(W::load(grad + i), W::load(weight + i));
  };
  const float mean_grad = sum_over<V>(count, weighted) / count;
  const float slope =
      sum_over<V>(count, [&](int64_t i, auto v) { return decltype(v)::mul(weighted(i, v), normal(i, v)); }) / count;
  sweep<V>(count, [&](int64_t i, auto v) {
    using W = decltype(v);
    const typename W::F n = normal(i, v), g = W::load(grad + i);
    const typename W::F rest = W::sub(weighted(i, v), W::fma(n, W::set(slope), W::set(mean_grad)));
    const typename W::F value = W::mul(rest, W::set(rstd));
    if (result) W::store(result + i, value);
    if (coarse) W::store(coarse + i, W::add(W::load(coarse + i), value));
    W::store(sums.weight + i, W::fma(g, n, W::load(sums.weight + i)));
    W::store(sums.shift + i, W::add(W::load(sums.shift + i), g));
    W::store(sums.bias + i, W::add(W::load(sums.bias + i), value));
  });
}

template <class V, class S>
void round_row(const float* from, int64_t count, void* to) {
  sweep<V>(count, [&](int64_t i, auto v) {
    using W = decltype(v);
    W::store(static_cast<S*>(to) + i, W::load(from + i));
  });
}

template <class V, class T>
RowsOf make_rows_of() {
  return {{add<V, T, float>, add<V, T, T>},
          normalise<V, T>,
          {backward<V, T, float>, backward<V, T, T>},
          {round_row<V, float>, round_row<V, T>}};
}

template <class V>
Rows make_rows() {
  return {{make_rows_of<V, float>(), make_rows_of<V, Half>(), make_rows_of<V, BFloat16>()}};
}

}  // namespace
}  // namespace sphinx::fusion
