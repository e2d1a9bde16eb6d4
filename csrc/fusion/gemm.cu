// Host side of the GEMM of the room fusion: picks the kernel for the device, describes the operands to TMA, launches.
// CUTLASS writes to std::cerr and asserts where it makes tensor maps; here they are made by hand, and a failure throws.
#include <cudaTypedefs.h>

#include <array>
#include <atomic>

#include "common/launch.cuh"
#include "fusion/gemm.h"
#include "fusion/gemm_sm80.cuh"
#include "fusion/gemm_sm90.cuh"

namespace sphinx::fusion {
namespace gemm {
namespace {

#ifdef SPHINX_SM90A
constexpr bool kHopperBuilt = true;
#else
constexpr bool kHopperBuilt = false;
#endif

struct Device {
  bool hopper;
  int multiprocessors;
};

// Asked for once per device: the answers do not change.
Device describe(int device) {
  static std::array<std::atomic<int>, 64> known{};
  const bool keep = device >= 0 && device < static_cast<int>(known.size());
  int packed = keep ? known[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int major = 0, minor = 0, multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "fusion gemm: device");
    check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "fusion gemm: device");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "fusion gemm: device");
    packed = 2 * multiprocessors + (major == 9 && minor == 0);
    if (keep) known[device].store(packed, std::memory_order_relaxed);
  }
  return {packed % 2 == 1, packed / 2};
}

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const auto status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const auto status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    check_cuda(status, "fusion gemm: cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess || !entry) {
      throw std::runtime_error(
          "fusion gemm: the CUDA driver has no cuTensorMapEncodeTiled; it must be of CUDA 12 or newer");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encoder;
}

// Boxes of `box` rows and one pipeline stage of k, in TMA's 128-byte swizzle; zeros outside [rows, k].
CUtensorMap tensor_map(const void* data, int64_t rows, int64_t k, int64_t ld, int box, DType dtype) {
  const cuuint64_t shape[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[] = {static_cast<cuuint64_t>(ld) * 2};  // bytes, of the dimensions after the first
  const cuuint32_t box_shape[] = {kHopperK, static_cast<cuuint32_t>(box)}, strides[] = {1, 1};
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(data), shape, pitch, box_shape, strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(concat("fusion gemm: no tensor map for [", rows, ", ", k, "] at ", data, ", ", ld,
                                    " elements a row: CUDA driver error ", static_cast<int>(status)));
  }
  return map;
}

template <class T, int TileN>
void launch_hopper(const GemmArgs& gemm, int multiprocessors, cudaStream_t stream) {
  HopperArgs args;
  args.plan = make_plan(gemm, TileN, kHopperK);
  const Plan& plan = args.plan;
  for (int p = 0; p < plan.problems; ++p) {
    for (int s = plan.first_segment[p]; s < plan.first_segment[p + 1]; ++s) {
      const Segment& segment = plan.segments[s];
      args.maps[s].a = tensor_map(segment.a, plan.m[p], segment.k, segment.lda, kTileM, gemm.dtype);
      args.maps[s].b = tensor_map(segment.b, plan.n, segment.k, segment.ldb, TileN, gemm.dtype);
    }
  }
  const auto kernel = gemm_sm90_kernel<T, TileN>;
  constexpr int shared = sizeof(typename Hopper<T, TileN>::Shared);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
             "fusion gemm: shared memory");
  kernel<<<std::min(multiprocessors, tile_count(plan)), kHopperThreads, shared, stream>>>(args);
}

template <class T>
void launch_ampere(const GemmArgs& gemm, cudaStream_t stream) {
  using A = Ampere<T>;
  const Plan plan = make_plan(gemm, A::kTileN, A::kTileK);
  const auto kernel = gemm_sm80_kernel<T>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, A::kShared),
             "fusion gemm: shared memory");
  kernel<<<tile_count(plan), A::kThreads, A::kShared, stream>>>(plan);
}

template <class T>
void launch(const GemmArgs& args, int device, cudaStream_t stream) {
  const Device found = describe(device);
  if (!kHopperBuilt || !found.hopper) return launch_ampere<T>(args, stream);
  const int blocks = found.multiprocessors;
  return hopper_tile_n(args, blocks) == 256 ? launch_hopper<T, 256>(args, blocks, stream)
                                            : launch_hopper<T, 128>(args, blocks, stream);
}

}  // namespace
}  // namespace gemm

void run_gemm_cuda(const GemmArgs& args, int device, void* stream) {
  check(gemm_fits(args), "fusion gemm: arguments that gemm_fits() refuses");
  const bool any = std::any_of(args.problems, args.problems + args.count, [](const Problem& p) { return p.m > 0; });
  if (!any) return;
  const DeviceGuard guard(device);
  const auto run = args.dtype == DType::bf16 ? gemm::launch<cute::bfloat16_t> : gemm::launch<cute::half_t>;
  run(args, device, static_cast<cudaStream_t>(stream));
  check_cuda(cudaGetLastError(), "fusion gemm");
}

}  // namespace sphinx::fusion
