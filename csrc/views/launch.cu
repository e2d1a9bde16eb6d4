// Host side of the room views on the GPU: packs the arguments and launches. Nothing here allocates, copies or waits.
#include <algorithm>

#include "common/dispatch.h"
#include "views/kernel.cuh"

namespace sphinx::views {
namespace {

template <class T, int N>
void launch(const Job* jobs, int count, cudaStream_t stream) {
  const Batch<N> batch = make_batch<N>(jobs, count);
  const int shared = static_cast<int>(sizeof(Shared)) + batch.table_bytes;
  check_cuda(cudaFuncSetAttribute(views_kernel<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "views: shared memory");
  views_kernel<T, N><<<dim3(tiles_of(batch.out), count), kBlock, shared, stream>>>(batch);
  check_cuda(cudaGetLastError(), "views");
}

}  // namespace

void run_cuda(const Job* jobs, int64_t count, int device, void* stream) {
  const DeviceGuard guard(device);
  for (int64_t done = 0; done < count; done += kLarge) {
    const int part = static_cast<int>(std::min<int64_t>(count - done, kLarge));
    dispatch_float(jobs[0].out.dtype, [&](auto type) {
      using T = decltype(type);
      const auto run = part <= kSmall ? launch<T, kSmall> : launch<T, kLarge>;
      run(jobs + done, part, static_cast<cudaStream_t>(stream));
    });
  }
}

}  // namespace sphinx::views
