// The loops of rows.h for AMX beside AVX-512: those of AVX-512, but for both products of bfloat16.
//
// Scores come transposed, keys x queries: keys are then read as they lie, and only the few queries are packed. Queries
// stay unscaled, where they are bfloat16 and every product is exact; scores are scaled as they are turned. As on the
// GPU, powers are rounded to bfloat16 before they are multiplied, and the softmax sums them unrounded.
//
// All tiles are whole, 16 rows of 64 bytes, with zeros where nothing is. A row of one and a column of the other make a
// number, so that a query's result is the same bits whatever is attended to beside it.
#include <cstring>

#include "attention/amx.h"
#include "attention/rows_common.h"

namespace sphinx::attention {
namespace {

using V = Sixteen;
using T = BFloat16;

constexpr int64_t kSide = 16;              // rows of a tile, and 4-byte words of a row
constexpr int64_t kDepth = 32;             // elements of a row
constexpr int64_t kLine = 64;              // bytes of a row
constexpr int64_t kCell = kSide * kDepth;  // elements of a tile
constexpr int64_t kColumns = 64;           // of values that are summed together: four tiles of sums
constexpr int64_t kFewest = kTile;         // positions: for less, the tiles would be zeros mostly

struct Config {  // as the instruction wants it
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

class Tiles {  // in use as long as this lives
 public:
  Tiles() {
    alignas(64) Config config;
    std::fill_n(config.bytes, 8, kLine);
    std::fill_n(config.rows, 8, kSide);
    amx::configure(&config);
  }
  ~Tiles() { amx::release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <class Word>
inline void store_words(T* to, Word words) {
  V::store(reinterpret_cast<float*>(to), words);
}

// queries [queries, head_dim] -> panel: for each block of 16 queries and each 32 elements a tile, of which row w holds
// elements 2 w and 2 w + 1 of the 16.
inline void pack_queries(const float* query, int64_t queries, int64_t head_dim, T* panel) {
  alignas(64) T rows[kSide * kMostHeadDim];
  for (int64_t block = 0; block < queries; block += kSide) {
    const int64_t there = std::min(kSide, queries - block);
    for (int64_t i = 0; i < there * head_dim; i += V::kWidth) V::store(rows + i, V::load(query + block * head_dim + i));
    std::fill(rows + there * head_dim, rows + kSide * head_dim, T{});
    for (int64_t e = 0; e < head_dim; e += 8, panel += 4 * kDepth) {  // four words
      V::F words[4];
      four_words<4>(reinterpret_cast<const char*>(rows + e), head_dim * sizeof(T), words);
      for (int64_t w = 0; w < 4; ++w) store_words(panel + w * kDepth, words[w]);
    }
  }
}

// scores [queries, kTile] of kTile positions.
inline void score_tiles(const T* panel, int64_t queries, int64_t head_dim, const T* key, int64_t step, float factor,
                        float* scores, Ahead& ahead) {
  alignas(64) float turned[kTile * kSide];
  const int64_t bytes = step * sizeof(T), next = kSide * step;
  for (int64_t block = 0; block < queries; block += kSide) {
    amx::zero<0>(), amx::zero<1>(), amx::zero<2>(), amx::zero<3>();
    const T* of = key;
    for (int64_t e = 0; e < head_dim; e += kDepth, of += kDepth, panel += kCell) {
      ahead.ask();
      amx::load<6>(panel, kLine);
      amx::load<4>(of, bytes), amx::multiply_add<0, 4, 6>();
      amx::load<5>(of + next, bytes), amx::multiply_add<1, 5, 6>();
      amx::load<4>(of + 2 * next, bytes), amx::multiply_add<2, 4, 6>();
      amx::load<5>(of + 3 * next, bytes), amx::multiply_add<3, 5, 6>();
    }
    amx::store<0>(turned, kLine), amx::store<1>(turned + kSide * kSide, kLine);
    amx::store<2>(turned + 2 * kSide * kSide, kLine), amx::store<3>(turned + 3 * kSide * kSide, kLine);
    for (int64_t first = 0; first < kTile; first += kSide) {
      for (int64_t q = 0; q < std::min(kSide, queries - block); q += 4) {
        V::F words[4];
        four_words<4>(reinterpret_cast<const char*>(turned + first * kSide + q), kLine, words);
        for (int64_t i = 0; i < 4; ++i) {
          V::store(scores + (block + q + i) * kTile + first, V::mul(words[i], V::set(factor)));
        }
      }
    }
  }
}

// kTile positions of up to 64 columns -> panel: for each 32 positions four tiles, of which row k holds positions 2 k
// and 2 k + 1. Within 32 columns, the first tile gets 4 of every 8 and the second the others: so they fall when
// neighbouring rows are interleaved, and sums are put in order at the end.
inline void pack_values(const T* value, int64_t step, int64_t columns, T* panel, Ahead& ahead) {
  for (int64_t k = 0; k < kTile / 2; ++k) {
    ahead.ask();
    const T* const own = value + 2 * k * step;
    T* const to = panel + k / kSide * 4 * kCell + k % kSide * kDepth;
    for (int64_t c = 0; c < columns; c += kDepth) {
      const __m512i even = _mm512_loadu_si512(own + c), odd = _mm512_loadu_si512(own + step + c);
      T* const pair = to + c / kSide * kCell;
      _mm512_storeu_si512(pair, _mm512_unpacklo_epi16(even, odd));
      _mm512_storeu_si512(pair + kCell, _mm512_unpackhi_epi16(even, odd));
    }
  }
}

inline void order_columns(float* out, int64_t count) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t i = 0; i < count; i += kDepth) {
    const __m512d even = _mm512_castps_pd(V::load(out + i)), odd = _mm512_castps_pd(V::load(out + i + kSide));
    V::store(out + i, _mm512_castpd_ps(_mm512_permutex2var_pd(even, first, odd)));
    V::store(out + i + kSide, _mm512_castpd_ps(_mm512_permutex2var_pd(even, second, odd)));
  }
}

// sums [16, kColumns] of 16 queries: power [16, kTile] . panel; the last two tiles only where they are.
template <bool kAll>
inline void multiply_values(const T* power, const T* panel, float* sums) {
  constexpr int64_t kStep = kTile * sizeof(T), kSumStep = kColumns * sizeof(float);
  amx::load<4>(power, kStep), amx::load<5>(power + kDepth, kStep);
  amx::zero<0>(), amx::zero<1>();
  amx::load<6>(panel, kLine), amx::multiply_add<0, 4, 6>();
  amx::load<7>(panel + kCell, kLine), amx::multiply_add<1, 4, 7>();
  if constexpr (kAll) {
    amx::zero<2>(), amx::zero<3>();
    amx::load<6>(panel + 2 * kCell, kLine), amx::multiply_add<2, 4, 6>();
    amx::load<7>(panel + 3 * kCell, kLine), amx::multiply_add<3, 4, 7>();
  }
  amx::load<6>(panel + 4 * kCell, kLine), amx::multiply_add<0, 5, 6>();
  amx::load<7>(panel + 5 * kCell, kLine), amx::multiply_add<1, 5, 7>();
  if constexpr (kAll) {
    amx::load<6>(panel + 6 * kCell, kLine), amx::multiply_add<2, 5, 6>();
    amx::load<7>(panel + 7 * kCell, kLine), amx::multiply_add<3, 5, 7>();
  }
  amx::store<0>(sums, kSumStep), amx::store<1>(sums + kSide, kSumStep);
  if constexpr (kAll) amx::store<2>(sums + 2 * kSide, kSumStep), amx::store<3>(sums + 3 * kSide, kSumStep);
}

// out [queries, head_dim] = out * keep + power . value, its columns as pack_values leaves them; `power` has whole
// blocks of queries.
inline void sum_tiles(const T* power, int64_t queries, int64_t head_dim, const T* value, int64_t step, float* out,
                      Start start, const float* keep, Ahead& ahead) {
  alignas(64) T panel[kTile * kColumns];
  alignas(64) float sums[kSide * kColumns];
  for (int64_t e = 0; e < head_dim; e += kColumns) {
    const int64_t columns = std::min(kColumns, head_dim - e);
    pack_values(value + e, step, columns, panel, ahead);
    for (int64_t m = 0; m < queries; ++m) {
      if (m % kSide == 0) {
        const auto multiply = columns == kColumns ? multiply_values<true> : multiply_values<false>;
        multiply(power + m * kTile, panel, sums);
      }
      const V::F kept = V::set(keep[m]);
      for (int64_t c = 0; c < columns; c += V::kWidth) {
        float* const to = out + m * head_dim + e + c;
        const V::F own = V::load(sums + m % kSide * kColumns + c);
        V::store(to, start == Start::zero ? own : V::fma(V::load(to), kept, own));
      }
    }
  }
}

// `count` rows and zeros for the others.
inline void fill_up(const T* from, int64_t step, int64_t count, int64_t head_dim, T* to) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * head_dim, from + i * step, head_dim * sizeof(T));
  std::fill(to + count * head_dim, to + kTile * head_dim, T{});
}

void attend_with_tiles(const float* query, int64_t queries, int64_t head_dim, const Keys& keys, Softmax* softmax,
                       float* out) {
  alignas(64) T panel[kMostQueries * kMostHeadDim], rest[kTile * kMostHeadDim], power[kMostQueries * kTile] = {};
  alignas(64) float scores[kMostQueries * kTile];
  float keep[kMostQueries];
  const Tiles tiles;
  pack_queries(query, queries, head_dim, panel);
  std::fill_n(softmax, queries, Softmax{-INFINITY, 0});
  bool begun = false;
  for (int64_t first = 0; first < keys.count; first += kTile) {
    const int64_t count = std::min(kTile, keys.count - first), whole = whole_vectors<V>(count);
    if (!any_of(keys, queries, first, count)) continue;
    const int64_t asks = ceil_div(queries, kSide) * (head_dim / kDepth) + ceil_div(head_dim, kColumns) * (kTile / 2);
    Ahead ahead = after<T>(keys, first, head_dim, asks);
    const auto rows = [&](const void* base, int64_t step, auto&& use) {
      const T* const own = static_cast<const T*>(base) + first * step;
      if (count == kTile) return use(own, step);
      fill_up(own, step, count, head_dim, rest);
      use(rest, head_dim);
    };
    rows(keys.key, keys.key_row, [&](const T* key, int64_t step) {
      score_tiles(panel, queries, head_dim, key, step, keys.factor, scores, ahead);
    });
    soften<V>(scores, queries, first, count, keys, softmax, keep);
    for (int64_t m = 0; m < queries; ++m) {
      for (int64_t i = 0; i < kTile; i += V::kWidth) {
        V::store(power + m * kTile + i, i < whole ? V::load(scores + m * kTile + i) : V::set(0));
      }
    }
    rows(keys.value, keys.value_row, [&](const T* value, int64_t step) {
      sum_tiles(power, queries, head_dim, value, step, out, begun ? Start::keep : Start::zero, keep, ahead);
    });
    begun = true;
  }
  if (!begun) std::fill_n(out, queries * head_dim, 0.0f);
  order_columns(out, queries * head_dim);
}

// With scaled queries, as the other loops want them: the same bits as theirs.
void attend_without_tiles(const float* query, int64_t queries, int64_t head_dim, const Keys& keys, Softmax* softmax,
                          float* out) {
  alignas(64) float scaled[kMostQueries * kMostHeadDim];
  for (int64_t i = 0; i < queries * head_dim; i += V::kWidth) {
    V::store(scaled + i, V::mul(V::load(query + i), V::set(keys.factor)));
  }
  rows_avx512().of[2].attend(scaled, queries, head_dim, keys, softmax, out);
}

// Which of the two depends on the shape of heads and on how many positions there are, never on the other queries.
void attend_bfloat16(const float* query, int64_t queries, int64_t head_dim, const Keys& keys, Softmax* softmax,
                     float* out) {
  const auto attend = keys.count < kFewest || head_dim % kDepth ? attend_without_tiles : attend_with_tiles;
  attend(query, queries, head_dim, keys, softmax, out);
}

void rotate_unscaled(const void* from, int64_t head_dim, const Rope& rope, int64_t position, float, float* to) {
  rotate_query<V, T>(from, head_dim, rope, position, 1.0f, to);
}

}  // namespace

const Rows& rows_amx() {
  static const Rows rows = [] {
    Rows made = rows_avx512();
    made.of[2].attend = attend_bfloat16;
    made.of[2].rotate_query = rotate_unscaled;
    return made;
  }();
  return rows;
}

}  // namespace sphinx::attention
