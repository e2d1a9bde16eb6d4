// The room views on the GPU: plain and correct, one element a thread (four in the cut). Compiled without contraction.
#pragma once

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "views/args.h"
#include "views/math.h"

namespace sphinx::views {

// What the two passes read, in the workspace: weights [out, max_taps], and where each axis meets the picture [out].
struct Taps {
  int32_t* weights;
  Tap *x, *y;
  int max_taps;
};

// One thread per output pixel of the axes.
__global__ void taps_kernel(Picture picture, Filter filter, int out, Taps taps) {
  SPHINX_FOR_EACH(i, out) {
    int32_t* const weights = taps.weights + i * taps.max_taps;
    const Window window = window_of(filter, i);
    window_weights(filter, i, window, weights);
    taps.x[i] = split_window(window, weights, pad_before(filter.in, picture.width), picture.width);
    taps.y[i] = split_window(window, weights, pad_before(filter.in, picture.height), picture.height);
  }
}

// Rows of the picture, and one of padding after them -> rows [height + 1, out, 3]: one thread per pixel.
__global__ void horizontal_kernel(Picture picture, int out, Taps taps, uint8_t* rows) {
  SPHINX_FOR_EACH(index, (picture.height + 1) * out) {
    const int64_t y = index / out, x = index % out;
    const Tap tap = taps.x[x];
    const bool padding = y == picture.height;
    const int32_t* weights = taps.weights + x * taps.max_taps + tap.skip;
    const uint8_t* pixel = picture.data + y * picture.stride_h + tap.first * picture.stride_w;
    int32_t sums[3];
#pragma unroll
    for (int c = 0; c < 3; ++c) sums[c] = kRoundHalf + (padding ? tap.total : tap.pad) * pad_colour(c);
    for (int i = 0; i < (padding ? 0 : tap.count); ++i, pixel += picture.stride_w) {
#pragma unroll
      for (int c = 0; c < 3; ++c) sums[c] += pixel[c * picture.stride_c] * weights[i];
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) rows[index * 3 + c] = clip8(sums[c]);
  }
}

// rows -> canvas [out, out, 3]: one thread per byte.
__global__ void vertical_kernel(int64_t height, int out, Taps taps, const uint8_t* rows, uint8_t* canvas) {
  const int64_t row_bytes = static_cast<int64_t>(out) * 3;
  SPHINX_FOR_EACH(index, out * row_bytes) {
    const int64_t y = index / row_bytes, x = index % row_bytes;
    const Tap tap = taps.y[y];
    const int32_t* weights = taps.weights + y * taps.max_taps + tap.skip;
    int32_t sum = kRoundHalf + rows[height * row_bytes + x] * tap.pad;
    for (int i = 0; i < tap.count; ++i) sum += rows[(tap.first + i) * row_bytes + x] * weights[i];
    canvas[index] = clip8(sum);
  }
}

// u8 -> normalised, and normalised rounded to fp16 (what the global view reads); filled by each block for itself.
struct Tables {
  float exact[3][256], half[3][256];
};

__device__ __forceinline__ void fill(Tables& tables) {
  for (int i = threadIdx.x; i < 3 * 256; i += blockDim.x) {
    const float value = normalise(i % 256, i / 256);
    tables.exact[i / 256][i % 256] = value;
    tables.half[i / 256][i % 256] = rounded<Half>(value);
  }
  __syncthreads();
}

// Element (y, x) of the global view of one channel; `canvas` points at the channel of the first pixel.
__device__ __forceinline__ float global_pixel(const uint8_t* canvas, const float* table, int size, int ratio, int y,
                                              int x) {
  const int64_t row_bytes = static_cast<int64_t>(size) * 3;
  if (ratio % 2) return table[canvas[(y * ratio + ratio / 2) * row_bytes + (x * ratio + ratio / 2) * 3]];
  const int y0 = tap_start(y, ratio), x0 = tap_start(x, ratio);
  float taps[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint8_t* row = canvas + clamp_index(y0 + j, size) * row_bytes;
    float pixels[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pixels[i] = table[row[clamp_index(x0 + i, size) * 3]];
    taps[j] = four_taps(pixels[0], pixels[1], pixels[2], pixels[3]);
  }
  return rounded<Half>(four_taps(taps[0], taps[1], taps[2], taps[3]));
}

constexpr int kVec = 4;

// canvas -> clip and dinov2 [V, 3, side, side]: four neighbours in a row a thread.
template <class T>
__global__ void cut_kernel(const uint8_t* canvas, Outputs out) {
  __shared__ Tables tables;
  fill(tables);
  const int size = out.picture_size, side = out.view_size, ratio = size / side, groups = (side + kVec - 1) / kVec;
  SPHINX_FOR_EACH(index, static_cast<int64_t>(num_views(size, side)) * 3 * side * groups) {
    const int64_t line = index / groups;
    const int x0 = static_cast<int>(index % groups) * kVec, y = static_cast<int>(line % side);
    const int c = static_cast<int>(line / side % 3), v = static_cast<int>(line / side / 3);
    const int count = side - x0 < kVec ? side - x0 : kVec;
    const Corner corner = crop_corner(v, ratio, side);
    Vec<T, kVec> clip{}, dinov2{};
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i >= count) continue;
      const int64_t pixel = static_cast<int64_t>(corner.y + y) * size + corner.x + x0 + i;
      const bool global = v == 0 && ratio > 1;
      clip.value[i] = from_float<T>(global ? global_pixel(canvas + c, tables.half[c], size, ratio, y, x0 + i)
                                           : tables.exact[c][canvas[pixel * 3 + c]]);
      dinov2.value[i] = dinov2_of(clip.value[i], c);
    }
    store(static_cast<T*>(out.clip) + line * side + x0, clip, count);
    if (out.dinov2) store(static_cast<T*>(out.dinov2) + line * side + x0, dinov2, count);
  }
}

// clip -> convnext [V, 3, target, target] by nearest pixels, through fp16.
template <class T>
__global__ void nearest_kernel(const T* clip, T* convnext, int64_t planes, int side, int target) {
  SPHINX_FOR_EACH(index, planes * target * target) {
    const int x = nearest_index(static_cast<int>(index % target), side, target);
    const int y = nearest_index(static_cast<int>(index / target % target), side, target);
    const int64_t plane = index / target / target;
    convnext[index] = from_float<T>(rounded<Half>(to_float(clip[(plane * side + y) * side + x])));
  }
}

}  // namespace sphinx::views
