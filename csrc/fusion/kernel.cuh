// The kernels of the room fusion: one row, or one chunk of rows, a block. Plain: every value is read once from memory,
// what is needed again lies in shared memory. Bound by memory: the rows are 2 % of the arithmetic before them.
//
// Thread t of n owns columns [4 t, 4 t + 4), [4 (t + n), ...) and so on, in every loop, so that what it left in shared
// memory is its own; the block meets only to sum.
#pragma once

#include "common/dispatch.h"
#include "common/launch.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "fusion/math.h"

namespace sphinx::fusion {

constexpr int kLanes = 4;

// Calls f(i, count) for the columns [i, i + count) of this thread.
template <class F>
__device__ __forceinline__ void for_columns(int64_t width, F&& f) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * kLanes;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * kLanes; i < width; i += step) {
    f(i, static_cast<int>(width - i < kLanes ? width - i : kLanes));
  }
}

// Calls f(k) for k < count <= kLanes, unrolled: what k indexes stays in registers.
template <class F>
__device__ __forceinline__ void for_lanes(int count, F&& f) {
#pragma unroll
  for (int k = 0; k < kLanes; ++k) {
    if (k < count) f(k);
  }
}

// `count` values of row `row` of `rows`, widened; zeros without rows.
template <class T>
__device__ __forceinline__ Vec<float, kLanes> values(const void* rows, int64_t at, int count) {
  Vec<float, kLanes> result{};
  if (!rows) return result;
  Vec<T, kLanes> own{};
  load(static_cast<const T*>(rows) + at, own, count);
#pragma unroll
  for (int k = 0; k < kLanes; ++k) result.value[k] = to_float(own.value[k]);
  return result;
}

template <class T>
__device__ __forceinline__ void write(void* rows, int64_t at, const Vec<float, kLanes>& from, int count) {
  Vec<T, kLanes> own;
#pragma unroll
  for (int k = 0; k < kLanes; ++k) own.value[k] = from_float<T>(from.value[k]);
  store(static_cast<T*>(rows) + at, own, count);
}

// LayerNorm of `y`, which lies in shared memory and whose sum over this thread's columns is `part`.
template <class T>
__device__ void normalise_row(const float* y, float part, const void* weight, const void* shift, int64_t width,
                              float eps, T* out, float* stats, float* scratch) {
  const float mean = block_sum(part, scratch) / static_cast<float>(width);
  float squares = 0;
  for_columns(width, [&](int64_t i, int count) {
    for_lanes(count, [&](int k) { squares += (y[i + k] - mean) * (y[i + k] - mean); });
  });
  const float rstd = 1 / sqrtf(block_sum(squares, scratch) / static_cast<float>(width) + eps);
  for_columns(width, [&](int64_t i, int count) {
    const auto w = values<T>(weight, i, count), s = values<T>(shift, i, count);
    Vec<float, kLanes> result{};
    for_lanes(count, [&](int k) { result.value[k] = (y[i + k] - mean) * rstd * w.value[k] + s.value[k]; });
    write<T>(out, i, result, count);
  });
  if (stats && threadIdx.x == 0) {
    stats[0] = mean;
    stats[1] = rstd;
  }
}

// Shared memory: a row of floats, and a float for each thread.
inline size_t forward_shared(int64_t width, unsigned threads) {
  return sizeof(float) * (width + threads);
}

// One block for each row of tokens. T: tokens, S: sums.
template <class T, class S>
__global__ void __launch_bounds__(kBlock) fusion_kernel(const __grid_constant__ Forward args) {
  SPHINX_DYNAMIC_SHARED(shared);
  float* const y = reinterpret_cast<float*>(shared);
  const Layout& layout = args.layout;
  const int64_t width = layout.width, per_view = token_rows(layout);
  const int64_t view = blockIdx.x / per_view, token = blockIdx.x % per_view;
  const int64_t first = first_row(args, view);
  if (first < 0) return;
  T* const out = static_cast<T*>(args.out) + (first + token) * args.stride;
  const Row what = row_of(layout, token);

  if (what.kind == RowKind::start || what.kind == RowKind::end) {
    const void* const tag = what.kind == RowKind::start ? args.start : args.end;
    for_columns(width, [&](int64_t i, int count) { write<T>(out, i, values<T>(tag, i, count), count); });
    return;
  }
  const bool query = what.kind == RowKind::query;
  const Projection of = query ? args.query : args.patch;
  const void *const fine = query ? args.queries : args.fine, *const coarse = query ? nullptr : args.coarse;
  const int64_t fine_row = view * (query ? layout.queries : patch_rows(layout)) + what.index;
  const int64_t coarse_at = query ? 0 : view * coarse_rows(layout) + coarse_row(layout, what.index);
  const int64_t kept_row = view * projected_rows(layout) + (query ? 0 : layout.queries) + what.index;
  float part = 0;
  for_columns(width, [&](int64_t i, int count) {
    const auto a = values<S>(fine, fine_row * width + i, count), b = values<S>(coarse, coarse_at * width + i, count);
    const auto bias = values<T>(of.bias, i, count);
    Vec<float, kLanes> sum{};
    for_lanes(count, [&](int k) {
      sum.value[k] = rounded<T>(a.value[k] + b.value[k] + bias.value[k]);
      y[i + k] = sum.value[k];
      part += sum.value[k];
    });
    if (args.kept) write<T>(args.kept, kept_row * width + i, sum, count);
  });
  normalise_row<T>(y, part, of.weight, of.shift, width, args.eps, out, args.stats ? args.stats + 2 * kept_row : nullptr,
                   y + width);
}

// One block for each row.
template <class T>
__global__ void __launch_bounds__(kBlock) norm_kernel(const __grid_constant__ Norm args) {
  SPHINX_DYNAMIC_SHARED(shared);
  float* const y = reinterpret_cast<float*>(shared);
  const int64_t in = row_offset(args, blockIdx.x, args.in_group, args.in_stride);
  T* const out = static_cast<T*>(args.out) + row_offset(args, blockIdx.x, args.out_group, args.out_stride);
  float part = 0;
  for_columns(args.width, [&](int64_t i, int count) {
    const auto x = values<T>(args.in, in + i, count);
    for_lanes(count, [&](int k) {
      y[i + k] = x.value[k];
      part += x.value[k];
    });
  });
  normalise_row<T>(y, part, args.weight, args.shift, args.width, args.eps, out, nullptr, y + args.width);
}

// --- backward
// ---------------------------------------------------------------------------------------------------------
// Shared memory: the sums over rows of three gradients, those over a coarse row's repeats, a float for each thread.
inline size_t backward_shared(int64_t width, unsigned threads) {
  return sizeof(float) * (4 * width + threads);
}

// What a block adds up, all in shared memory.
struct Running {
  float *weight, *shift, *bias, *coarse, *scratch;
};

// One token's way back to its sum (rows_common.h has the formula).
template <class T, class S>
__device__ void row_back(const Backward& args, int64_t view, int64_t projected, const void* weight, void* result,
                         int64_t result_row, const Running& running) {
  const Layout& layout = args.layout;
  const int64_t width = layout.width;
  const int64_t token = (view * token_rows(layout) + projected + (layout.tags ? 1 : 0)) * width;
  const int64_t kept = view * projected_rows(layout) + projected;
  const float mean = args.stats[2 * kept], rstd = args.stats[2 * kept + 1];
  float grads = 0, slopes = 0;
  for_columns(width, [&](int64_t i, int count) {
    const auto g = values<T>(args.grad, token + i, count), y = values<T>(args.kept, kept * width + i, count);
    const auto w = values<T>(weight, i, count);
    for_lanes(count, [&](int k) {
      grads += g.value[k] * w.value[k];
      slopes += g.value[k] * w.value[k] * ((y.value[k] - mean) * rstd);
    });
  });
  const float mean_grad = block_sum(grads, running.scratch) / static_cast<float>(width);
  const float slope = block_sum(slopes, running.scratch) / static_cast<float>(width);
  for_columns(width, [&](int64_t i, int count) {
    const auto g = values<T>(args.grad, token + i, count), y = values<T>(args.kept, kept * width + i, count);
    const auto w = values<T>(weight, i, count);
    Vec<float, kLanes> back{};
    for_lanes(count, [&](int k) {
      const float normal = (y.value[k] - mean) * rstd;
      back.value[k] = rstd * (g.value[k] * w.value[k] - mean_grad - normal * slope);
      running.weight[i + k] += g.value[k] * normal;
      running.shift[i + k] += g.value[k];
      running.bias[i + k] += back.value[k];
      running.coarse[i + k] += back.value[k];
    });
    if (result) write<S>(result, result_row * width + i, back, count);
  });
}

// Block (c, 0) takes chunk c of the patch rows, block (c, 1) chunk c of the query rows.
template <class T, class S>
__global__ void __launch_bounds__(kBlock) fusion_backward_kernel(const __grid_constant__ Backward args) {
  SPHINX_DYNAMIC_SHARED(shared);
  float* const memory = reinterpret_cast<float*>(shared);
  const Layout& layout = args.layout;
  const int64_t width = layout.width, chunk = blockIdx.x;
  const Running running{memory, memory + width, memory + 2 * width, memory + 3 * width, memory + 4 * width};
  const auto clear = [&](float* from, int64_t rows) {
    for_columns(width, [&](int64_t i, int count) {
      for (int64_t row = 0; row < rows; ++row) {
        for_lanes(count, [&](int k) { from[row * width + i + k] = 0; });
      }
    });
  };
  clear(memory, 4);

  const bool query = blockIdx.y == 1;
  const bool coarse = !query && args.coarse;
  const int64_t units = query ? layout.queries : coarse ? coarse_rows(layout) : patch_rows(layout);
  const Range range = chunk_of(layout.views * units, chunk, args.chunks);
  for (int64_t unit = range.begin; unit < range.end; ++unit) {
    const int64_t view = unit / units, row = unit % units;
    if (query) {
      row_back<T, S>(args, view, row, args.query_weight, args.queries, unit, running);
    } else if (!coarse) {
      row_back<T, S>(args, view, layout.queries + row, args.patch_weight, args.fine, unit, running);
    } else {
      clear(running.coarse, 1);
      for (int64_t k = 0; k < repeats_of(layout, row); ++k) {
        const int64_t patch = patch_row(layout, row, k);
        row_back<T, S>(args, view, layout.queries + patch, args.patch_weight, args.fine,
                       view * patch_rows(layout) + patch, running);
      }
      for_columns(width, [&](int64_t i, int count) {
        write<S>(args.coarse, unit * width + i, values<float>(running.coarse, i, count), count);
      });
    }
  }
  float* const sums = (query ? args.query_sums : args.patch_sums) + chunk * 3 * width;
  for_columns(width, [&](int64_t i, int count) {
    for (int row = 0; row < 3; ++row) {
      write<float>(sums, row * width + i, values<float>(memory, row * width + i, count), count);
    }
  });
}

// For the host: calls f with a value of T, the dtype of tokens, and one of S, that of sums.
template <class F>
void dispatch_sums(DType dtype, DType sums, F&& f) {
  dispatch_float(dtype, [&](auto token) {
    if (sums == DType::f32) {
      f(token, float{});
    } else {
      f(token, token);
    }
  });
}

}  // namespace sphinx::fusion
