// The GEMM for Ampere and whatever else runs the PTX: mma.sync fed by ldmatrix from a ring of four stages in shared
// memory that cp.async fills. A block computes one tile of 128 x 128 with four warps of 64 x 64; the hardware hands out
// the tiles in the order of the list. 64 KB and at most 255 registers a thread let two blocks share a multiprocessor,
// so one computes while the other starts or stores.
#pragma once

#include <cute/tensor.hpp>

#include "fusion/gemm_plan.h"
#include "fusion/gemm_store.cuh"

namespace sphinx::fusion::gemm {

template <class T>
struct Ampere {
  static constexpr int kTileN = 128, kTileK = kAmpereK, kStages = 4, kThreads = 128;
  static constexpr int kChunk = 8, kChunks = kTileK / kChunk;  // elements of a 16-byte load, loads across a row
  static constexpr int kLoadRows = kThreads / kChunks, kLoads = kTileN / kLoadRows;
  static_assert(kTileM == kTileN, "A and B are loaded alike");

  using Op = std::conditional_t<std::is_same_v<T, cute::half_t>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  // 2 x 2 warps; a step of 32 x 32 gives each warp whole ldmatrix.x4 of both operands.
  using Mma = decltype(cute::make_tiled_mma(Op{}, cute::Layout<cute::Shape<cute::_2, cute::_2>>{},
                                            cute::Tile<cute::_32, cute::_32, cute::_16>{}));
  using Ldmatrix = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, T>;
  // Rows of 64 bytes. The eight rows of one 8 x 8 matrix, and the eight chunks that eight threads store, lie in
  // different banks.
  using Atom = decltype(cute::composition(
      cute::Swizzle<2, 3, 3>{},
      cute::Layout<cute::Shape<cute::_8, cute::Int<kTileK>>, cute::Stride<cute::Int<kTileK>, cute::_1>>{}));
  using Ring =
      decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kTileM>, cute::Int<kTileK>, cute::Int<kStages>>{}));

  static constexpr int kRing = cute::cosize_v<Ring>;
  static constexpr int kShared = 2 * kRing * static_cast<int>(sizeof(T));
};

// One thread's loads from one operand: a chunk in each of kLoads rows, kLoadRows apart.
template <class T>
struct Rows {
  const T* data;   // the chunk of the first row
  int64_t stride;  // elements from one of the rows to the next
  int count;       // rows that exist

  __device__ Rows(const void* base, int64_t ld, int first, int end)
      : data(static_cast<const T*>(base) + first * ld), stride(Ampere<T>::kLoadRows * ld) {
    count = first < end ? (end - first - 1) / Ampere<T>::kLoadRows + 1 : 0;
  }
};

template <class T>
__global__ void __launch_bounds__(Ampere<T>::kThreads, 2) gemm_sm80_kernel(const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)  // not for the host: that doubles the compile time
  using namespace cute;
  using A = Ampere<T>;
  extern __shared__ __align__(128) unsigned char raw[];
  T* const ring = reinterpret_cast<T*>(raw);
  const auto sA = make_tensor(make_smem_ptr(ring), typename A::Ring{});  // (128, 32, stage)
  const auto sB = make_tensor(make_smem_ptr(ring + A::kRing), typename A::Ring{});

  const int thread = threadIdx.x;
  const Tile tile = tile_at(plan, blockIdx.x, A::kTileN);
  const int m = plan.m[tile.problem];

  // --- loading: one stage after another, through the segments; what does not exist is filled with zeros ---
  const int load_row = thread / A::kChunks, load_column = thread % A::kChunks * A::kChunk;
  int segment = plan.first_segment[tile.problem], k = load_column;
  const auto rows_of = [&](const void* base, int64_t ld, int first, int end) {
    return Rows<T>(base, ld, first + load_row, end);
  };
  auto a = rows_of(plan.segments[segment].a, plan.segments[segment].lda, tile.row, m);
  auto b = rows_of(plan.segments[segment].b, plan.segments[segment].ldb, tile.column, plan.n);
  const auto load = [&](int stage) {
    using Copy = SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>;
    if (segment < plan.first_segment[tile.problem + 1]) {
      const bool inside = k < plan.segments[segment].k;
      CUTE_UNROLL
      for (int i = 0; i < A::kLoads; ++i) {
        const int row = load_row + i * A::kLoadRows;
        Copy::copy(*reinterpret_cast<const uint128_t*>(a.data + i * a.stride + k),
                   *reinterpret_cast<uint128_t*>(&sA(row, load_column, stage)), inside && i < a.count);
        Copy::copy(*reinterpret_cast<const uint128_t*>(b.data + i * b.stride + k),
                   *reinterpret_cast<uint128_t*>(&sB(row, load_column, stage)), inside && i < b.count);
      }
      k += A::kTileK;
      if (k - load_column >= plan.segments[segment].k && ++segment < plan.first_segment[tile.problem + 1]) {
        k = load_column;
        a = rows_of(plan.segments[segment].a, plan.segments[segment].lda, tile.row, m);
        b = rows_of(plan.segments[segment].b, plan.segments[segment].ldb, tile.column, plan.n);
      }
    }
    cp_async_fence();  // past the end too: the waits below count groups
  };
  CUTE_UNROLL
  for (int stage = 0; stage < A::kStages - 1; ++stage) load(stage);

  // --- computing: fragments of one k block are loaded while the other is multiplied ---
  typename A::Mma mma;
  const auto slice = mma.get_slice(thread);
  auto rA = slice.partition_fragment_A(sA(_, _, 0));  // (MMA, MMA_M, k blocks)
  auto rB = slice.partition_fragment_B(sB(_, _, 0));
  auto sums = partition_fragment_C(mma, Shape<Int<kTileM>, Int<A::kTileN>>{});  // (MMA, MMA_M, MMA_N)
  clear(sums);

  const auto copy_a = make_tiled_copy_A(typename A::Ldmatrix{}, mma);
  const auto copy_b = make_tiled_copy_B(typename A::Ldmatrix{}, mma);
  const auto from_a = copy_a.get_slice(thread).partition_S(sA);  // (CPY, MMA_M, k blocks, stage)
  const auto from_b = copy_b.get_slice(thread).partition_S(sB);
  auto to_a = copy_a.get_slice(thread).retile_D(rA);
  auto to_b = copy_b.get_slice(thread).retile_D(rB);
  constexpr int kBlocks = decltype(size<2>(rA))::value;
  const auto fetch = [&](auto block, int stage) {
    copy(copy_a, from_a(_, _, block, stage), to_a(_, _, block));
    copy(copy_b, from_b(_, _, block, stage), to_b(_, _, block));
  };

  int read = 0, write = A::kStages - 1;
  cp_async_wait<A::kStages - 2>();
  __syncthreads();
  fetch(Int<0>{}, read);
  CUTE_NO_UNROLL
  for (int step = plan.steps[tile.problem]; step > 0; --step) {
    for_each(make_int_sequence<kBlocks>{}, [&](auto block) {
      if constexpr (block == kBlocks - 1) {  // the next stage is there, and nobody reads this one any more
        read = read == A::kStages - 1 ? 0 : read + 1;
        cp_async_wait<A::kStages - 2>();
        __syncthreads();
      }
      fetch(Int<(block + 1) % kBlocks>{}, read);  // after the last step: of a stage that nobody filled, and unused
      if constexpr (block == 0) {                 // into the stage that the barrier above freed a step ago
        load(write);
        write = write == A::kStages - 1 ? 0 : write + 1;
      }
      cute::gemm(mma, rA(_, _, block), rB(_, _, block), sums);
    });
  }

  // --- storing: a thread's fragments lie 32 rows and 16 columns apart ---
  const auto place = slice.partition_C(make_identity_tensor(Shape<Int<kTileM>, Int<A::kTileN>>{}))(_0{});
  CUTE_UNROLL
  for (int i = 0; i < size<1>(sums); ++i) {
    CUTE_UNROLL
    for (int half = 0; half < 2; ++half) {  // the two rows of a fragment
      const int row = tile.row + get<0>(place) + 32 * i + 8 * half;
      float* const line = plan.out[tile.problem] + row * plan.ldo[tile.problem];
      CUTE_UNROLL
      for (int j = 0; j < size<2>(sums); j += 2) {
        const auto pair = [&](int block) {
          return make_float2(sums(2 * half, i, block), sums(2 * half + 1, i, block));
        };
        const float4 four = trade(pair(j), pair(j + 1));
        const int left = tile.column + get<1>(place) + 16 * j, column = traded_column(left, left + 16);
        if (row < m && column < plan.n) *reinterpret_cast<float4*>(line + column) = four;
      }
    }
  }
#else
  __trap();  // Hopper has a kernel of its own
#endif
}

}  // namespace sphinx::fusion::gemm
