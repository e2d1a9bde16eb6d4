// The matrix products of the room fusion in one launch: a short list of problems, each a sum over operands that are
// never concatenated,
//     out_p[m_p, n] = sum over s of a_ps[m_p, k_ps] . b_ps[n, k_ps]^T
// The sum stays in float32 registers from the first segment to the last and is written once, in float32.
//
// Equal arguments on equal devices give equal bits: every sum runs over k in one fixed order, in one block.
#pragma once

#include <cstdint>
#include <limits>

#include "common/tensor_view.h"

namespace sphinx::fusion {

constexpr int kMaxProblems = 4, kMaxSegments = 4;  // segments of one problem
constexpr int kMaxSegmentsInAll = 12;              // their tensor maps are kernel arguments, of which there are 4 KB

struct Segment {  // of GemmArgs::dtype, rows of k elements one behind another
  const void* a;  // [m, k]
  int64_t lda;    // elements from one row to the next; more than k in a slice of something wider
  const void* b;  // [n, k]
  int64_t ldb, k;
};

struct Problem {
  Segment segments[kMaxSegments];
  int segment_count;
  int64_t m;   // 0: nothing to do
  float* out;  // [m, n]; apart from every operand and every other out
  int64_t ldo;
};

struct GemmArgs {
  Problem problems[kMaxProblems];
  int count;
  int64_t n;    // columns of every out
  DType dtype;  // of a and b: bfloat16 or float16
};

// Whether the kernels can compute this: their loads are of 16 bytes, their stores too. Where they cannot, a library
// can.
inline bool gemm_fits(const GemmArgs& args) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max() / 2;
  const auto aligned = [](const void* data) { return data && reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const auto size = [](int64_t value, int64_t multiple) { return 0 < value && value <= most && value % multiple == 0; };

  if (args.dtype != DType::bf16 && args.dtype != DType::f16) return false;
  if (args.count < 1 || args.count > kMaxProblems || !size(args.n, 8)) return false;
  int segments = 0;
  int64_t tiles = 0;
  for (int p = 0; p < args.count; ++p) {
    const Problem& problem = args.problems[p];
    if (problem.m == 0) continue;
    if (!size(problem.m, 1) || problem.segment_count < 1 || problem.segment_count > kMaxSegments) return false;
    if (!aligned(problem.out) || !size(problem.ldo, 4) || problem.ldo < args.n) return false;
    int64_t depth = 0;
    for (int s = 0; s < problem.segment_count; ++s) {
      const Segment& segment = problem.segments[s];
      if (!aligned(segment.a) || !aligned(segment.b) || !size(segment.k, 8)) return false;
      if (!size(segment.lda, 8) || !size(segment.ldb, 8)) return false;
      if (segment.lda < segment.k || segment.ldb < segment.k) return false;
      depth += segment.k;
    }
    if (depth > most) return false;
    segments += problem.segment_count;
    tiles += (problem.m / 128 + 1) * (args.n / 128 + 1);
  }
  return segments <= kMaxSegmentsInAll && tiles <= most;
}

// CUDA, on `stream`; nothing is allocated or waited for, and the call can be captured into a graph. `args` fit.
// Compute capability 9.0 runs the kernel for Hopper where the build holds it, all others from 8.0 on the one for
// Ampere.
void run_gemm_cuda(const GemmArgs& args, int device, void* stream);

}  // namespace sphinx::fusion
