// The loops of rows.h, written once over a vector type V of common/simd.h. Included by rows_*.cpp, each compiled for
// its instruction set; everything here has internal linkage.
//
// Keys are walked in tiles of 64 positions: scores of all queries, a softmax that goes on from tile to tile, the values
// summed by it. Both products are the same loop, and every number in them is a chain of fused multiply-adds in the
// order of elements or positions, so that a query's result is the same bits whatever is attended to beside it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention/panels.h"
#include "attention/product.h"
#include "attention/rows.h"

namespace sphinx::attention {
namespace {

template <class V>
inline int64_t whole_vectors(int64_t count) {
  return ceil_div(count, V::kWidth) * V::kWidth;
}

// scores [queries, kTile] of `count` positions, whole vectors of them.
template <class V, class T>
inline void score(const float* query, int64_t queries, int64_t head_dim, const T* key, int64_t step, int64_t count,
                  float* panel, float* scores, Ahead& ahead) {
  for (int64_t e = 0; e < head_dim; e += kChunk) {
    const int64_t elements = std::min(kChunk, head_dim - e);
    fill_panel<V>(key + e, step, count, elements, panel, ahead);
    product<V>(queries, whole_vectors<V>(count), {query + e, head_dim}, panel, whole_vectors<V>(count), elements,
               scores, kTile, e ? Start::add : Start::zero, nullptr, ahead);
  }
}

// Scores of a tile, [queries, kTile] -> exp2(score - largest so far); `keep`: what all sums so far are to be multiplied
// by. Lanes past `count`, and positions with a 0 in the mask, become 0.
template <class V>
inline void soften(float* scores, int64_t queries, int64_t first, int64_t count, const Keys& keys, Softmax* softmax,
                   float* keep) {
  const int64_t whole = whole_vectors<V>(count);
  if (keys.mask || count < whole) {
    for (int64_t m = 0; m < queries; ++m) {
      float* const own = scores + m * kTile;
      std::fill(own + count, own + whole, -INFINITY);
      const uint8_t* const mask = keys.mask ? keys.mask + m / keys.per_row * keys.mask_step + first : nullptr;
      for (int64_t i = 0; mask && i < count; ++i) {
        if (!mask[i]) own[i] = -INFINITY;
      }
    }
  }
  const auto with = [&](auto vectors) {  // a constant where the tile is whole: the loops unroll
    for (int64_t m = 0; m < queries; ++m) {
      const float* const own = scores + m * kTile;
      typename V::F most = V::load(own);
      for (int64_t i = 1; i < vectors; ++i) most = V::max(most, V::load(own + i * V::kWidth));
      const float before = softmax[m].largest, largest = std::max(before, V::largest(most));
      keep[m] = before == -INFINITY ? 0 : Lane::exp2(before - largest);
      softmax[m].largest = largest;
    }
    for (int64_t m = 0; m < queries; ++m) {
      float* const own = scores + m * kTile;
      const typename V::F origin = V::set(softmax[m].largest == -INFINITY ? 0 : softmax[m].largest);
      typename V::F sum = V::set(0);
      for (int64_t i = 0; i < vectors; ++i) {
        const typename V::F power = V::exp2(V::sub(V::load(own + i * V::kWidth), origin));
        V::store(own + i * V::kWidth, power);
        sum = V::add(sum, power);
      }
      softmax[m].sum = softmax[m].sum * keep[m] + V::sum(sum);
    }
  };
  if (whole == kTile) {
    with(std::integral_constant<int64_t, kTile / V::kWidth>{});
  } else {
    with(whole / V::kWidth);
  }
}

// out [queries, head_dim] = out * keep + power . value
template <class V, class T>
inline void sum_values(const float* power, int64_t queries, int64_t head_dim, const T* value, int64_t step,
                       int64_t count, float* panel, float* out, Start start, const float* keep, Ahead& ahead) {
  for (int64_t e = 0; e < head_dim; e += kChunk) {
    const int64_t columns = std::min(kChunk, head_dim - e);
    const Left left{power, kTile};
    if constexpr (!std::is_same_v<T, float>) {
      if (queries > 2 * Tile<V>::kRows) {  // widened once for all of them
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = 0; c < columns; c += V::kWidth) {
            V::store(panel + i * kChunk + c, V::load(value + i * step + e + c));
          }
        }
        product<V>(queries, columns, left, panel, kChunk, count, out + e, head_dim, start, keep, ahead);
        continue;
      }
    }
    product<V>(queries, columns, left, value + e, step, count, out + e, head_dim, start, keep, ahead);
  }
}

inline bool any_of(const Keys& keys, int64_t queries, int64_t first, int64_t count) {
  if (!keys.mask) return true;
  for (int64_t row = 0; row < queries / keys.per_row; ++row) {
    const uint8_t* const mask = keys.mask + row * keys.mask_step + first;
    if (std::any_of(mask, mask + count, [](uint8_t one) { return one != 0; })) return true;
  }
  return false;
}

// What to ask for during the tile at `first`: the next tile, of these keys or of what is walked after them, and a fair
// part of what is needed soon.
template <class T>
inline Ahead after(const Keys& keys, int64_t first, int64_t head_dim, int64_t asks) {
  Region next = keys.next;
  if (first + kTile < keys.count) {
    const int64_t bytes = std::min(kTile, keys.count - first - kTile) * head_dim * static_cast<int64_t>(sizeof(T));
    next = {static_cast<const T*>(keys.key) + (first + kTile) * keys.key_row,
            static_cast<const T*>(keys.value) + (first + kTile) * keys.value_row,
            keys.key_row == head_dim && keys.value_row == head_dim ? bytes : 0};
  }
  const int64_t tile = first / kTile, all = ceil_div(keys.count, kTile);
  const int64_t begin = keys.soon_count * tile / all, end = keys.soon_count * (tile + 1) / all;
  return {next, keys.soon + begin, end - begin, asks};
}

// How often it is asked: at every block of words of the panel and every few steps of both products.
template <class V, class T>
inline int64_t asks_of(int64_t count, int64_t queries, int64_t head_dim) {
  const auto tiles = [](int64_t columns) { return ceil_div(columns, V::kWidth * Tile<V>::kVectors); };
  const int64_t fills = ceil_div(count, V::kWidth) * head_dim * sizeof(T) / 16;
  const int64_t deep = tiles(count) * (head_dim / kDeep) + tiles(head_dim) * (count / kDeep);
  return fills + ceil_div(queries, Tile<V>::kRows) * deep;
}

template <class V, class T>
void attend(const float* query, int64_t queries, int64_t head_dim, const Keys& keys, Softmax* softmax, float* out) {
  alignas(64) float panel[kTile * kChunk];
  alignas(64) float scores[kMostQueries * kTile];
  float keep[kMostQueries];
  const T *const key = static_cast<const T*>(keys.key), *const value = static_cast<const T*>(keys.value);
  std::fill_n(softmax, queries, Softmax{-INFINITY, 0});
  bool begun = false;
  for (int64_t first = 0; first < keys.count; first += kTile) {
    const int64_t count = std::min(kTile, keys.count - first);
    if (!any_of(keys, queries, first, count)) continue;
    Ahead ahead = after<T>(keys, first, head_dim, asks_of<V, T>(count, queries, head_dim));
    score<V>(query, queries, head_dim, key + first * keys.key_row, keys.key_row, count, panel, scores, ahead);
    soften<V>(scores, queries, first, count, keys, softmax, keep);
    sum_values<V>(scores, queries, head_dim, value + first * keys.value_row, keys.value_row, count, panel, out,
                  begun ? Start::keep : Start::zero, keep, ahead);
    begun = true;
  }
  if (!begun) std::fill_n(out, queries * head_dim, 0.0f);
}

// Calls write(i, value of element i, rotated) for all of them.
template <class V, class T, class Write>
inline void rotate_with(const T* from, int64_t head_dim, const Rope& rope, int64_t position, Write&& write) {
  const int64_t half = rope.cos ? rope.half : 0;
  const float *const cos = rope.cos + position * half, *const sin = rope.sin + position * half;
  int64_t i = 0;
  if (!rope.interleaved) {
    for (; i + V::kWidth <= half; i += V::kWidth) {
      const typename V::F a = V::load(from + i), b = V::load(from + half + i), c = V::load(cos + i),
                          s = V::load(sin + i);
      write(i, V::sub(V::mul(a, c), V::mul(b, s)), V{});
      write(half + i, V::add(V::mul(b, c), V::mul(a, s)), V{});
    }
  }
  for (; i < half; ++i) {
    const int64_t first = rope.interleaved ? 2 * i : i, second = rope.interleaved ? 2 * i + 1 : half + i;
    write(first, rotated_at(from, first, rope, position), Lane{});
    write(second, rotated_at(from, second, rope, position), Lane{});
  }
  int64_t rest = 2 * half;
  for (; rest + V::kWidth <= head_dim; rest += V::kWidth) write(rest, V::load(from + rest), V{});
  for (; rest < head_dim; ++rest) write(rest, to_float(from[rest]), Lane{});
}

template <class V, class T>
void rotate(const void* from, int64_t head_dim, const Rope& rope, int64_t position, void* to) {
  rotate_with<V>(static_cast<const T*>(from), head_dim, rope, position,
                 [&](int64_t i, auto value, auto v) { decltype(v)::store(static_cast<T*>(to) + i, value); });
}

template <class V, class T>
void rotate_query(const void* from, int64_t head_dim, const Rope& rope, int64_t position, float factor, float* to) {
  rotate_with<V>(static_cast<const T*>(from), head_dim, rope, position, [&](int64_t i, auto value, auto v) {
    using W = decltype(v);
    W::store(to + i, W::mul(W::template rounded<T>(value), W::set(factor)));
  });
}

template <class V>
void fold(float* all, const float* other, const Weights& weights, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; i += V::kWidth) {
    V::store(all + i, V::fma(V::load(other + i), V::set(weights.other), V::mul(V::load(all + i), V::set(weights.all))));
  }
}

template <class V, class T>
void scale(const float* from, float factor, int64_t head_dim, void* to) {
  for (int64_t i = 0; i < head_dim; i += V::kWidth) {
    V::store(static_cast<T*>(to) + i, V::mul(V::load(from + i), V::set(factor)));
  }
}

template <class V, class T>
RowsOf make_rows_of() {
  return {attend<V, T>, rotate<V, T>, rotate_query<V, T>, fold<V>, scale<V, T>};
}

template <class V>
Rows make_rows() {
  return {{make_rows_of<V, float>(), make_rows_of<V, Half>(), make_rows_of<V, BFloat16>()}};
}

}  // namespace
}  // namespace sphinx::attention
