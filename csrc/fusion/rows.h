// The inner loops of the room fusion on the CPU, one row at a time; a set for each instruction set. Within a row sums
// are kept in float32, in an order that depends on the instruction set alone.
#pragma once

#include <cstdint>

namespace sphinx::fusion {

// A row's part in the sums over rows: each is [D] and is added to.
struct ColumnSums {
  float *weight, *shift, *bias;
};

struct RowsOf {  // a dtype T; `sums` of float (0) or T (1)
  // y = fine + coarse + bias, rounded to T; fine or coarse may be NULL.
  void (*add[2])(const void* fine, const void* coarse, const void* bias, int64_t count, void* y);
  // out = (y - mean) * rstd * weight + shift; stats: mean, rstd. `out` may be y.
  void (*normalise)(const void* y, const void* weight, const void* shift, int64_t count, float eps, void* out,
                    float* stats);
  // From the gradient of a token to that of its sum, which goes to `result` and is added to `coarse`; either may be
  // NULL.
  void (*backward[2])(const void* grad, const void* y, const float* stats, const void* weight, int64_t count,
                      void* result, float* coarse, const ColumnSums& sums);
  void (*round[2])(const float* from, int64_t count, void* to);  // to `sums`
};

struct Rows {
  RowsOf of[3];  // float32, float16, bfloat16
};

const Rows& rows_plain();
const Rows& rows_avx2();
const Rows& rows_avx512();

#ifdef SPHINX_X86
constexpr const Rows& (*kRows[])() = {rows_plain, rows_avx2, rows_avx512};  // in the order of Isa
#else
constexpr const Rows& (*kRows[])() = {rows_plain};
#endif

}  // namespace sphinx::fusion
