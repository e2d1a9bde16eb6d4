// The CUDA kernels of the room fusion, and the arithmetic both halves share, as a C library for ctypes.
#include <cuda_runtime.h>  // host_cuda's

#include "fusion/kernel.cuh"

using namespace sphinx;
using namespace sphinx::fusion;

namespace {

constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

// views, queries, grid, repeat, tags, width
Layout layout_of(const int64_t* n) {
  return {n[0], n[1], n[2], n[3], n[4] != 0, n[5]};
}

}  // namespace

extern "C" {

// What run_cuda in launch.cu does, with `threads` a block, a power of two. dtype, sums: 0 float32, 1 float16,
// 2 bfloat16. They return 1 when no block left its shared memory.
int forward_on_host(const int64_t* layout, const void* const* in, void* const* out, int64_t rows, int64_t stride,
                    const int64_t* first, float eps, int dtype, int sums, unsigned threads) {
  Forward args{};
  args.layout = layout_of(layout);
  args.fine = in[0], args.coarse = in[1], args.queries = in[2];
  args.columns = args.layout.width;
  args.patch = {in[3], in[4], in[5]};
  args.query = {in[6], in[7], in[8]};
  args.start = in[9], args.end = in[10];
  args.eps = eps;
  args.first = first, args.rows = rows, args.stride = stride;
  args.out = out[0], args.kept = out[1], args.stats = static_cast<float*>(out[2]);
  args.dtype = kDTypes[dtype], args.sums = kDTypes[sums];
  const auto blocks = static_cast<unsigned>(args.layout.views * token_rows(args.layout));
  bool kept = false;
  dispatch_sums(args.dtype, args.sums, [&](auto token, auto sum) {
    kept = launch_on_host({blocks, 1, 1}, threads, forward_shared(args.layout.width, threads),
                          fusion_kernel<decltype(token), decltype(sum)>, args);
  });
  return kept;
}

int backward_on_host(const int64_t* layout, const void* const* in, void* const* out, int64_t chunks, int dtype,
                     int sums, unsigned threads) {
  Backward args{};
  args.layout = layout_of(layout);
  args.grad = in[0], args.kept = in[1], args.stats = static_cast<const float*>(in[2]);
  args.patch_weight = in[3], args.query_weight = in[4];
  args.fine = out[0], args.coarse = out[1], args.queries = out[2];
  args.patch_sums = static_cast<float*>(out[3]), args.query_sums = static_cast<float*>(out[4]);
  args.chunks = chunks;
  args.dtype = kDTypes[dtype], args.sums = kDTypes[sums];
  const Dim3 grid{static_cast<unsigned>(chunks), args.layout.queries ? 2u : 1u, 1};
  bool kept = false;
  dispatch_sums(args.dtype, args.sums, [&](auto token, auto sum) {
    kept = launch_on_host(grid, threads, backward_shared(args.layout.width, threads),
                          fusion_backward_kernel<decltype(token), decltype(sum)>, args);
  });
  return kept;
}

// shape: groups, rows, width; strides: of a group and a row of x, then of out.
int norm_on_host(const int64_t* shape, const int64_t* strides, const void* x, const void* weight, const void* shift,
                 void* out, float eps, int dtype, unsigned threads) {
  const Norm args{shape[0], shape[1], shape[2], strides[0], strides[1], strides[2],    strides[3],
                  x,        weight,   shift,    out,        eps,        kDTypes[dtype]};
  bool kept = false;
  dispatch_float(args.dtype, [&](auto type) {
    kept = launch_on_host({static_cast<unsigned>(args.groups * args.rows), 1, 1}, threads,
                          forward_shared(args.width, threads), norm_kernel<decltype(type)>, args);
  });
  return kept;
}

// The shared arithmetic, row by row.
int64_t rows_of(const int64_t* layout, int kind) {
  const Layout of = layout_of(layout);
  return kind == 0 ? patch_rows(of) : kind == 1 ? projected_rows(of) : kind == 2 ? token_rows(of) : coarse_rows(of);
}
int64_t coarse_row_of(const int64_t* layout, int64_t row) {
  return coarse_row(layout_of(layout), row);
}
int64_t repeats(const int64_t* layout, int64_t row) {
  return repeats_of(layout_of(layout), row);
}
int64_t patch_row_of(const int64_t* layout, int64_t row, int64_t k) {
  return patch_row(layout_of(layout), row, k);
}
int row_kind(const int64_t* layout, int64_t row) {
  return static_cast<int>(row_of(layout_of(layout), row).kind);
}
int64_t row_index(const int64_t* layout, int64_t row) {
  return row_of(layout_of(layout), row).index;
}
int64_t first_of(const int64_t* layout, int64_t rows, const int64_t* first, int64_t view) {
  Forward args{};
  args.layout = layout_of(layout);
  args.rows = rows, args.first = first;
  return first_row(args, view);
}
int64_t chunk_begin(int64_t count, int64_t chunk, int64_t chunks) {
  return chunk_of(count, chunk, chunks).begin;
}
int64_t chunk_end(int64_t count, int64_t chunk, int64_t chunks) {
  return chunk_of(count, chunk, chunks).end;
}

}  // extern "C"
