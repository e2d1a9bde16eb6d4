// Host side of the room views on the GPU: workspace layout and launches. Nothing here allocates or waits.
#include <algorithm>

#include "common/dispatch.h"
#include "views/kernel.cuh"

namespace sphinx::views {
namespace {

// What resize_cuda keeps in its workspace: weights [S, max_taps], taps of x and of y [S], rows [height + 1, S, 3].
struct Workspace {
  Filter filter;
  size_t x, y, rows, bytes;  // offsets; the weights stand at 0

  Workspace(int64_t height, int64_t width, int picture_size)
      : filter(make_filter(std::max(height, width), picture_size)) {
    x = align(static_cast<size_t>(picture_size) * filter.max_taps * sizeof(int32_t));
    y = align(x + picture_size * sizeof(Tap));
    rows = align(y + picture_size * sizeof(Tap));
    bytes = align(rows + static_cast<size_t>(height + 1) * picture_size * 3);
  }

  static size_t align(size_t bytes) { return (bytes + 15) / 16 * 16; }
};

}  // namespace

size_t resize_workspace(int64_t height, int64_t width, int picture_size) {
  return Workspace(height, width, picture_size).bytes;
}

void resize_cuda(const Picture& picture, uint8_t* canvas, int picture_size, void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const Workspace layout(picture.height, picture.width, picture_size);
  char* base = static_cast<char*>(workspace);
  const Taps taps{reinterpret_cast<int32_t*>(base), reinterpret_cast<Tap*>(base + layout.x),
                  reinterpret_cast<Tap*>(base + layout.y), layout.filter.max_taps};
  auto* rows = reinterpret_cast<uint8_t*>(base + layout.rows);

  const int64_t size = picture_size;
  taps_kernel<<<blocks_for(size), kBlock, 0, cuda_stream>>>(picture, layout.filter, picture_size, taps);
  horizontal_kernel<<<blocks_for((picture.height + 1) * size), kBlock, 0, cuda_stream>>>(picture, picture_size, taps,
                                                                                         rows);
  vertical_kernel<<<blocks_for(size * size * 3), kBlock, 0, cuda_stream>>>(picture.height, picture_size, taps, rows,
                                                                           canvas);
  check_cuda(cudaGetLastError(), "views: resize");
}

void cut_cuda(const uint8_t* canvas, const Outputs& out, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int64_t planes = static_cast<int64_t>(num_views(out.picture_size, out.view_size)) * 3;
  const int64_t side = out.view_size, target = out.convnext_size;
  dispatch_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    cut_kernel<T><<<blocks_for(planes * side * ((side + kVec - 1) / kVec)), kBlock, 0, cuda_stream>>>(canvas, out);
    if (out.convnext) {
      nearest_kernel<T><<<blocks_for(planes * target * target), kBlock, 0, cuda_stream>>>(
          static_cast<const T*>(out.clip), static_cast<T*>(out.convnext), planes, out.view_size, out.convnext_size);
    }
  });
  check_cuda(cudaGetLastError(), "views: cut");
}

}  // namespace sphinx::views
