// The CUDA kernels of the room views, and the arithmetic both halves share, as a C library for ctypes.
#include <cuda_runtime.h>  // host_cuda's

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "views/kernel.cuh"

using namespace sphinx;
using namespace sphinx::views;

extern "C" {

void half_to_float(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(Half{in[i]});
}
void float_to_half(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<Half>(in[i]).bits;
}
void bfloat16_to_float(const uint16_t* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(BFloat16{in[i]});
}
void float_to_bfloat16(const float* in, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<BFloat16>(in[i]).bits;
}

int nearest(int i, int in, int out) {
  return nearest_index(i, in, out);
}

// The steps of resize_cuda and cut_cuda in launch.cu. dtype: 0 float32, 1 float16, 2 bfloat16.
void views_on_host(const uint8_t* pixels, int64_t height, int64_t width, int picture_size, int view_size,
                   int convnext_size, int dtype, unsigned blocks, uint8_t* canvas, void* clip, void* dinov2,
                   void* convnext) {
  const Picture picture{pixels, height, width, width * 3, 3, 1};
  const int64_t side = std::max(height, width), size = picture_size;
  const Filter filter = make_filter(side, size);
  std::vector<Tap> x(size), y(size);
  std::vector<int32_t> weights(size * filter.max_taps);
  std::vector<uint8_t> rows((height + 1) * size * 3);
  const views::Taps taps{weights.data(), x.data(), y.data(), filter.max_taps};
  launch_on_host(blocks, taps_kernel, picture, filter, picture_size, taps);
  launch_on_host(blocks, horizontal_kernel, picture, picture_size, taps, rows.data());
  launch_on_host(blocks, vertical_kernel, height, picture_size, taps, rows.data(), canvas);

  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  const Outputs out{clip, dinov2, convnext, picture_size, view_size, convnext_size, dtypes[dtype]};
  dispatch_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    launch_on_host(blocks, cut_kernel<T>, canvas, out);
    launch_on_host(blocks, nearest_kernel<T>, static_cast<const T*>(clip), static_cast<T*>(convnext),
                   static_cast<int64_t>(num_views(picture_size, view_size)) * 3, view_size, convnext_size);
  });
}

// 1 when parallel_for covers [0, count) once each, -1 when the exception of item `bad` came through.
int parallel_covers(int64_t count, int64_t grain, int threads, int64_t bad) {
  std::vector<int> seen(count);
  try {
    parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i == bad) throw std::runtime_error("bad item");
        ++seen[i];
      }
    });
  } catch (const std::runtime_error&) {
    return -1;
  }
  return std::all_of(seen.begin(), seen.end(), [](int times) { return times == 1; });
}

}  // extern "C"
