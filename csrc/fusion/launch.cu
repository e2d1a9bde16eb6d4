// Host side of the room fusion on the GPU. Nothing here allocates, copies or waits.
#include "fusion/kernel.cuh"

namespace sphinx::fusion {
namespace {

template <class Args>
void launch(void (*kernel)(Args), dim3 grid, size_t shared, const Args& args, void* stream) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
             "fusion: shared memory for this width");
  kernel<<<grid, kBlock, shared, static_cast<cudaStream_t>(stream)>>>(args);
  check_cuda(cudaGetLastError(), "fusion");
}

unsigned checked_blocks(int64_t count) {
  check(count <= 0x7fffffff, "out: expected at most 2^31 - 1 rows, got ", count);
  return static_cast<unsigned>(count);
}

}  // namespace

void run_cuda(const Forward& args, int device, void* stream) {
  const DeviceGuard guard(device);
  dispatch_sums(args.dtype, args.sums, [&](auto token, auto sum) {
    launch(fusion_kernel<decltype(token), decltype(sum)>,
           dim3(checked_blocks(args.layout.views * token_rows(args.layout))), forward_shared(args.layout.width, kBlock),
           args, stream);
  });
}

void run_cuda(const Backward& args, int device, void* stream) {
  const DeviceGuard guard(device);
  dispatch_sums(args.dtype, args.sums, [&](auto token, auto sum) {
    launch(fusion_backward_kernel<decltype(token), decltype(sum)>,
           dim3(checked_blocks(args.chunks), args.layout.queries ? 2 : 1), backward_shared(args.layout.width, kBlock),
           args, stream);
  });
}

void run_cuda(const Norm& args, int device, void* stream) {
  const DeviceGuard guard(device);
  dispatch_float(args.dtype, [&](auto type) {
    launch(norm_kernel<decltype(type)>, dim3(checked_blocks(args.groups * args.rows)),
           forward_shared(args.width, kBlock), args, stream);
  });
}

}  // namespace sphinx::fusion
