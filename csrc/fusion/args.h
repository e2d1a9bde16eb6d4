// Room fusion: encoder features -> visual tokens, the rows a language model reads. Arguments and declarations.
//
// A token is LayerNorm(sum + bias), where sum = feature . weight^T comes from a matrix product outside this file (torch
// on the CPU, gemm.h on the GPU). A view's tokens are rows of `out`, one after another:
//     [start]  Q query tokens  1 class token  grid * grid patch tokens, row-major  [end]
// The sums of the class and patch rows come in two parts that are added here: `fine`, a row for each of them, and
// `coarse`, of an encoder whose map is `repeat` times smaller on both axes: its class row, then a row for every
// repeat x repeat square of patches.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/tensor_view.h"

namespace sphinx::fusion {

struct Layout {
  int64_t views;
  int64_t queries;  // Q, may be 0
  int64_t grid;     // patches on a side
  int64_t repeat;   // patches on a side of what one row of `coarse` covers; 1 without one
  bool tags;        // start and end rows
  int64_t width;    // D
};

struct Projection {                   // of D values each, in `dtype`
  const void *bias, *weight, *shift;  // the linear layer's bias; the norm's weight and bias
};

// Sums -> tokens. Sums may come in several blocks of columns; the call that brings the last one normalises.
struct Forward {
  Layout layout;
  const void *fine, *coarse, *queries;  // [views * rows, columns], in `sums`; NULL where there are none
  int64_t column, columns;              // the block
  Projection patch, query;
  const void *start, *end;  // [D]
  float eps;
  const int64_t* first;  // [views] the row of `out` where each view starts; NULL: one view after another
  int64_t rows;          // of `out`
  int64_t stride;        // elements from one row of `out` to the next
  void* out;
  void* kept;    // [views, Q + 1 + grid^2, D] sum + bias, rounded to `dtype`, for the gradient; NULL: not wanted
  float* stats;  // [views, Q + 1 + grid^2, 2] mean and 1 / sqrt(var + eps); NULL: not wanted
  DType dtype;   // of everything else
  DType sums;    // float32, or `dtype`
};

// Gradients of the sums, of the norms' weights and biases and of the linear layers' biases.
struct Backward {
  Layout layout;
  const void* grad;  // [views, rows of a view, D] of the tokens
  const void* kept;
  const float* stats;
  const void *patch_weight, *query_weight;  // the norms' weights
  void *fine, *coarse, *queries;            // as in Forward, D columns; NULL where not wanted
  // [chunks, 3, D] for rows that are always the same of a chunk: sums over them of the gradients of the norm's weight,
  // its bias and the linear layer's bias. Their sum over the chunks is left to the caller; its order is fixed.
  float *patch_sums, *query_sums;
  int64_t chunks;
  DType dtype, sums;
};

// Rows [groups, rows, D] of `in` normalised into rows of `out`, which may be a slice of a wider buffer, or `in` itself.
struct Norm {
  int64_t groups, rows, width;
  int64_t in_group, in_stride, out_group, out_stride;  // elements from one group, and from one row, to the next
  const void *in, *weight, *shift;
  void* out;
  float eps;
  DType dtype;
};

void run_cpu(const Forward& args, Isa isa, int threads);
void run_cpu(const Backward& args, Isa isa, int threads);
void run_cpu(const Norm& args, Isa isa, int threads);

// CUDA, on `stream`; nothing is allocated, copied or waited for. A view whose rows would leave `out` is not written.
void run_cuda(const Forward& args, int device, void* stream);
void run_cuda(const Backward& args, int device, void* stream);
void run_cuda(const Norm& args, int device, void* stream);

}  // namespace sphinx::fusion
