// The GEMM for Hopper: TMA fills a ring of stages in shared memory, wgmma empties it, mbarriers keep them apart.
//
// A block has a multiprocessor to itself and stays for several tiles. One thread of its first warpgroup issues all
// loads and runs ahead as far as the ring allows, across segments and across tiles; a segment is only another pair of
// tensor maps. The other two warpgroups each multiply 64 rows of the tile by all its columns.
//
// Tiles of 128 x 256 need as many cycles of shared memory (writes of TMA, reads of wgmma) as of the tensor cores, and
// load 3/4 of the bytes per product from L2 that tiles of 128 x 128 do. Five views of 448 (m = 1285, 325, 160; n =
// 4096) are 176 + 48 + 32 such tiles on 132 multiprocessors, in stages 40, 48 and 12 deep: two rounds of the deep ones,
// whose slowest block works 80 stages of 1024 cycles where an even share would be 72. One view has too few wide tiles
// for 132 blocks; gemm_plan.h then takes the narrow ones.
//
// Not done: clusters. At the tensor cores' full rate 132 blocks ask L2 for 48 KB in 1024 cycles each, 11 TB/s, which is
// more than it is known to give, so L2 is the likely limit. Two blocks side by side that share A by multicast would ask
// for 40 KB, and n has an even number of tiles; two that share B would ask for 32 KB, but 11 rows of tiles make 6 pairs
// and the slowest block 88 stages.
#pragma once

#include <cuda.h>  // types of tensor maps; libcuda is not linked
#include <cutlass/arch/reg_reconfig.h>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>

#include "fusion/gemm_plan.h"
#include "fusion/gemm_store.cuh"

namespace sphinx::fusion::gemm {

constexpr int kGroupThreads = 128, kGroups = 2, kHopperThreads = (1 + kGroups) * kGroupThreads;

struct HopperArgs {
  struct Maps {
    CUtensorMap a, b;
  } maps[kMaxSegmentsInAll];  // of plan.segments
  Plan plan;
};
static_assert(sizeof(HopperArgs) <= 4096, "kernel arguments");

template <class T, int TileN>
struct Hopper {
  static constexpr int kStages = TileN == 256 ? 4 : 6;  // 192 KB
  using TileShape = cute::Shape<cute::Int<kTileM>, cute::Int<TileN>, cute::Int<kHopperK>>;
  using Mma = decltype(cute::make_tiled_mma(cute::GMMA::ss_op_selector<T, T, float, TileShape>(),
                                            cute::Layout<cute::Shape<cute::Int<kGroups>, cute::_1, cute::_1>>{}));
  // Rows of 128 bytes, swizzled over eight rows: what TMA's 128-byte mode writes and wgmma reads.
  template <int Rows>
  using Ring = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                            cute::Shape<cute::Int<Rows>, cute::Int<kHopperK>, cute::Int<kStages>>{}));
  static constexpr int kStageA = kTileM * kHopperK, kStageB = TileN * kHopperK;
  static_assert(cute::cosize_v<Ring<kTileM>> == kStages * kStageA && cute::cosize_v<Ring<TileN>> == kStages * kStageB);

  using Pipeline = cutlass::PipelineTmaAsync<kStages>;
  struct Shared {
    T a[kStages * kStageA];  // at a multiple of 1024 bytes, the swizzle's period, as every stage
    T b[kStages * kStageB];
    typename Pipeline::SharedStorage barriers;
  };
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The producer: one thread.
template <class T, int TileN>
__device__ __forceinline__ void load_tiles(const HopperArgs& args, typename Hopper<T, TileN>::Shared& shared,
                                           typename Hopper<T, TileN>::Pipeline& pipeline) {
  using H = Hopper<T, TileN>;
  constexpr uint64_t hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const Plan& plan = args.plan;
  for (int s = 0; s < plan.first_segment[plan.problems]; ++s) {
    cute::prefetch_tma_descriptor(&args.maps[s].a);
    cute::prefetch_tma_descriptor(&args.maps[s].b);
  }
  auto write = cutlass::make_producer_start_state<typename H::Pipeline>();
  for (int turn = 0;; ++turn) {
    const int index = tile_of_turn(turn, blockIdx.x, gridDim.x);
    if (index >= tile_count(plan)) break;
    const Tile tile = tile_at(plan, index, TileN);
    for (int s = plan.first_segment[tile.problem]; s < plan.first_segment[tile.problem + 1]; ++s) {
      const int depth = static_cast<int>(plan.segments[s].k);
      CUTLASS_PRAGMA_NO_UNROLL
      for (int k = 0; k < depth; k += kHopperK) {
        pipeline.producer_acquire(write);  // waits until the stage is empty, then expects its bytes
        uint64_t* const full = pipeline.producer_get_barrier(write);
        const int stage = write.index();
        // A box counts in full: what lies outside the map arrives as zeros.
        cute::SM90_TMA_LOAD_2D::copy(&args.maps[s].a, full, hint, shared.a + stage * H::kStageA, k, tile.row);
        cute::SM90_TMA_LOAD_2D::copy(&args.maps[s].b, full, hint, shared.b + stage * H::kStageB, k, tile.column);
        ++write;
      }
    }
  }
  pipeline.producer_tail(write);
}

// A consumer: one warpgroup. It takes every stage of every tile off the ring, also of tiles that have no rows for it.
template <class T, int TileN>
__device__ __forceinline__ void multiply_tiles(const HopperArgs& args, typename Hopper<T, TileN>::Shared& shared,
                                               typename Hopper<T, TileN>::Pipeline& pipeline, int group) {
  using namespace cute;
  using H = Hopper<T, TileN>;
  const Plan& plan = args.plan;
  const int thread = threadIdx.x - kGroupThreads;  // of both consumers
  typename H::Mma mma;
  const auto slice = mma.get_slice(group * kGroupThreads);  // its descriptors are those of the whole warpgroup
  const auto sA = make_tensor(make_smem_ptr(shared.a), typename H::template Ring<kTileM>{});  // (128, 64, stage)
  const auto sB = make_tensor(make_smem_ptr(shared.b), typename H::template Ring<TileN>{});
  const auto rA = slice.make_fragment_A(slice.partition_A(sA));  // (MMA, 1, k blocks, stage), descriptors
  const auto rB = slice.make_fragment_B(slice.partition_B(sB));
  auto sums = partition_fragment_C(mma, Shape<Int<kTileM>, Int<TileN>>{});  // ((2, 2, TileN / 8), 1, 1)
  static_assert(decltype(size(sums))::value == TileN / 2);
  const auto place = mma.get_slice(thread).partition_C(make_identity_tensor(Shape<Int<kTileM>, Int<TileN>>{}))(_0{});

  cutlass::PipelineState<H::kStages> read, done;  // the stage to multiply, and the one to hand back
  const auto wait = [&] { pipeline.consumer_wait(read, pipeline.consumer_try_wait(read)); };
  const auto release = [&] {  // one arrival per warp, see num_consumers below
    if (threadIdx.x % 32 == 0) pipeline.consumer_release(done);
    ++done;
  };
  const auto multiply = [&] {
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
    CUTE_UNROLL
    for (int block = 0; block < size<2>(rA); ++block) {
      cute::gemm(mma, rA(_, _, block, read.index()), rB(_, _, block, read.index()), sums);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    ++read;
  };

  for (int turn = 0;; ++turn) {
    const int index = tile_of_turn(turn, blockIdx.x, gridDim.x);
    if (index >= tile_count(plan)) break;
    const Tile tile = tile_at(plan, index, TileN);
    const int steps = plan.steps[tile.problem], m = plan.m[tile.problem];
    if (tile.row + group * kGroupRows >= m) {  // the tensor cores are the other group's
      for (int step = 0; step < steps; ++step) {
        wait();
        ++read;
        release();
      }
      continue;
    }

    mma.accumulate_ = GMMA::ScaleOut::Zero;
    wait();
    multiply();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int step = 1; step < steps; ++step) {
      wait();
      multiply();
      warpgroup_wait<1>();  // this step's products run on; those of the step before are done
      warpgroup_fence_operand(sums);
      release();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    release();

    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {  // the two rows of a fragment
      const int row = tile.row + get<0>(place) + 8 * half;
      float* const line = plan.out[tile.problem] + row * plan.ldo[tile.problem];
      CUTE_UNROLL
      for (int j = 0; j < TileN / 8; j += 2) {
        const auto pair = [&](int block) {
          return make_float2(sums(4 * block + 2 * half), sums(4 * block + 2 * half + 1));
        };
        const float4 four = trade(pair(j), pair(j + 1));
        const int left = tile.column + get<1>(place) + 8 * j, column = traded_column(left, left + 8);
        if (row < m && column < plan.n) *reinterpret_cast<float4*>(line + column) = four;
      }
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <class T, int TileN>
__global__ void __launch_bounds__(kHopperThreads, 1) gemm_sm90_kernel(const __grid_constant__ HopperArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using H = Hopper<T, TileN>;
  extern __shared__ __align__(1024) unsigned char hopper_shared[];
  auto& shared = *reinterpret_cast<typename H::Shared*>(hopper_shared);

  const int group = cutlass::canonical_warp_group_idx();  // the same in all lanes, and known to be
  typename H::Pipeline::Params params;
  params.transaction_bytes = (H::kStageA + H::kStageB) * sizeof(T);
  params.role = group == 0 ? H::Pipeline::ThreadCategory::Producer : H::Pipeline::ThreadCategory::Consumer;
  params.is_leader = group == 0;  // of its threads only the elected one below touches the pipeline
  params.num_consumers =
      kGroups * kGroupThreads / 32;  // arrivals that empty a stage: in a cluster of one, just a count
  typename H::Pipeline pipeline(shared.barriers, params, cute::Shape<cute::_1, cute::_1, cute::_1>{});
  __syncthreads();

  // 64,512 registers: 384 x 168 at the start, then 128 x 40 and 256 x 232.
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (cutlass::canonical_warp_idx_sync() == 0 && cute::elect_one_sync()) load_tiles<T, TileN>(args, shared, pipeline);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    multiply_tiles<T, TileN>(args, shared, pipeline, group - 1);
  }
#else
  __trap();  // needs sm_90a
#endif
}

}  // namespace sphinx::fusion::gemm
