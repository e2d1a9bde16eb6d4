// The inner loops of the room attention on the CPU; a set for each instruction set. All sums are kept in float32 and
// their order does not depend on how many queries are attended to together.
#pragma once

#include <cstdint>

#include "attention/ahead.h"
#include "attention/math.h"

namespace sphinx::attention {

constexpr int64_t kMostQueries = 64;  // that share one walk over keys
constexpr int64_t kMostHeadDim = 256;

// `count` positions of one slot and head.
struct Keys {
  const void *key, *value;
  int64_t key_row, value_row;  // elements from one position to the next
  int64_t count;
  const uint8_t* mask;  // of the first row's first position; NULL: none
  int64_t mask_step;    // to the next row's
  int64_t per_row;      // queries of one row
  float factor;         // of the queries, for loops whose rotate_query leaves it to their attend
  Region next;          // what will be walked after them, and what else is needed soon, is fetched meanwhile
  const Region* soon;
  int64_t soon_count;
};

struct RowsOf {  // a dtype T
  // [queries, head_dim] attend to `keys`: softmax [queries] and what it has summed, out [queries, head_dim].
  void (*attend)(const float* query, int64_t queries, int64_t head_dim, const Keys& keys, Softmax* softmax, float* out);
  // A head, rotated to `position` and rounded to T; as T, or in float32, times `factor`.
  void (*rotate)(const void* from, int64_t head_dim, const Rope& rope, int64_t position, void* to);
  void (*rotate_query)(const void* from, int64_t head_dim, const Rope& rope, int64_t position, float factor, float* to);
  // all = all * weights.all + other * weights.other
  void (*fold)(float* all, const float* other, const Weights& weights, int64_t head_dim);
  void (*scale)(const float* from, float factor, int64_t head_dim, void* to);
};

struct Rows {
  RowsOf of[3];  // float32, float16, bfloat16
};

const Rows& rows_plain();
const Rows& rows_avx2();
const Rows& rows_avx512();
const Rows& rows_amx();

#ifdef SPHINX_AMX
constexpr const Rows& (*kRows[])() = {rows_plain, rows_avx2, rows_avx512, rows_amx};  // in the order of Isa
#elif defined(SPHINX_X86)
constexpr const Rows& (*kRows[])() = {rows_plain, rows_avx2, rows_avx512};
#else
constexpr const Rows& (*kRows[])() = {rows_plain};
#endif

}  // namespace sphinx::attention
