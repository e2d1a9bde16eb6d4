// Host side of the room attention on the GPU. Nothing here allocates, copies or waits.
#include "attention/tensor.cuh"

namespace sphinx::attention {
namespace {

template <class Inner>
void launch(const Args& args, float* partial, int32_t* arrived, void* stream) {
  Plan plan = make_plan(args, Inner::kMost);
  place(plan, partial, arrived);
  const size_t shared = shared_of<Inner>(plan);
  check_cuda(cudaFuncSetAttribute(attention_kernel<Inner>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)),
             "attention: shared memory for this head_dim");
  attention_kernel<Inner>
      <<<static_cast<unsigned>(plan.blocks), kThreads, shared, static_cast<cudaStream_t>(stream)>>>(plan);
  check_cuda(cudaGetLastError(), "attention");
}

}  // namespace

int64_t partial_floats(const Args& args) {
  return floats_of(args);
}

void run_cuda(const Args& args, float* partial, int32_t* arrived, int device, void* stream) {
  if (args.rows == 0) return;
  const DeviceGuard guard(device);
  dispatch_inner(args, [&](auto inner) { launch<typename decltype(inner)::type>(args, partial, arrived, stream); });
}

}  // namespace sphinx::attention
