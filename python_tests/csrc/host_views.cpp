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

// What run_cuda in launch.cu does. dtype: 0 float32, 1 float16, 2 bfloat16; `threads` a block; axes: in, before,
// extent, out, begin of y, then of x, for each picture; strides in bytes. Returns 1 when no block left its shared
// memory.
int views_on_host(int count, const uint8_t* const* pixels, const int64_t* strides, const int64_t* axes,
                  const int* vertical_first, int picture_size, int view_size, int dinov2_size, int convnext_size,
                  int dtype, unsigned threads, uint8_t* canvas, void* clip, void* dinov2, void* convnext) {
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  const Outputs out{clip, dinov2, convnext, picture_size, view_size, dinov2_size, convnext_size, dtypes[dtype]};
  std::vector<Job> jobs;
  for (int i = 0; i < count; ++i, axes += 10, strides += 3) {
    const auto axis = [](const int64_t* n) {
      return Axis{n[0], n[1], n[2], static_cast<int>(n[3]), static_cast<int>(n[4])};
    };
    const Geometry geometry{axis(axes), axis(axes + 5), vertical_first[i] != 0};
    jobs.push_back(
        {{pixels[i], geometry.y.extent, geometry.x.extent, strides[0], strides[1], strides[2]}, geometry, canvas, out});
  }
  const auto batch = make_batch<kSmall>(jobs.data(), count);
  const Dim3 grid{static_cast<unsigned>(tiles_of(out)), static_cast<unsigned>(count), 1};
  const size_t shared = sizeof(Shared) + batch.table_bytes;
  bool kept = false;
  dispatch_float(out.dtype, [&](auto type) {
    kept = launch_on_host(grid, threads, shared, views_kernel<decltype(type), kSmall>, batch);
  });
  return kept;
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
