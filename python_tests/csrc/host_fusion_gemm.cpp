// The tile list of the fusion GEMM behind a C interface, for test_fusion_gemm.py.
#include "fusion/gemm_plan.h"

using namespace sphinx;
using namespace sphinx::fusion;

namespace {

// `sizes`: count, then for each problem m, segments and the k of each. Operands are addresses that nobody reads.
GemmArgs make_args(const int64_t* sizes, int64_t n) {
  GemmArgs args{};
  args.n = n;
  args.dtype = DType::bf16;
  args.count = static_cast<int>(*sizes++);
  for (int p = 0; p < args.count; ++p) {
    Problem& problem = args.problems[p];
    problem.m = *sizes++;
    problem.segment_count = static_cast<int>(*sizes++);
    problem.out = reinterpret_cast<float*>(4096 * (p + 1));
    problem.ldo = n;
    for (int s = 0; s < problem.segment_count; ++s) {
      const int64_t k = *sizes++;
      const char* const base = reinterpret_cast<const char*>(16 * (p * kMaxSegments + s + 1));
      problem.segments[s] = {base, k + 8, base, k + 16, k};
    }
  }
  return args;
}

}  // namespace

extern "C" {

// Every tile in the order of the blocks' turns: block, problem (by its place in `sizes`), row, column, steps, and
// whether its segments are those of that problem. The number of tiles; a block that goes on after its end gives -1.
int gemm_tiles(const int64_t* sizes, int64_t n, int tile_n, int tile_k, int blocks, int64_t* out) {
  const GemmArgs args = make_args(sizes, n);
  const gemm::Plan plan = gemm::make_plan(args, tile_n, tile_k);
  int tiles = 0;
  for (int block = 0; block < blocks; ++block) {
    bool ended = false;
    for (int turn = 0; turn < 2 * gemm::tile_count(plan) / blocks + 4; ++turn) {
      const int index = gemm::tile_of_turn(turn, block, blocks);
      if (index >= gemm::tile_count(plan)) {
        ended = true;
        continue;
      }
      if (ended) return -1;
      const gemm::Tile tile = gemm::tile_at(plan, index, tile_n);
      const int p = static_cast<int>(reinterpret_cast<intptr_t>(plan.out[tile.problem]) / 4096) - 1;
      const int first = plan.first_segment[tile.problem], last = plan.first_segment[tile.problem + 1];
      bool same = last - first == args.problems[p].segment_count && plan.m[tile.problem] == args.problems[p].m;
      for (int s = first; s < last; ++s) same = same && plan.segments[s].a == args.problems[p].segments[s - first].a;
      for (int64_t value : {block, p, tile.row, tile.column, plan.steps[tile.problem], static_cast<int>(same)}) {
        *out++ = value;
      }
      ++tiles;
    }
  }
  return tiles;
}

int gemm_tile_n(const int64_t* sizes, int64_t n, int blocks) {
  return gemm::hopper_tile_n(make_args(sizes, n), blocks);
}

int64_t gemm_makespan(const int64_t* sizes, int64_t n, int tile_n, int blocks) {
  return gemm::hopper_makespan(gemm::make_plan(make_args(sizes, n), tile_n, gemm::kHopperK), tile_n, blocks);
}

// gemm_fits() with one thing changed: `what` counts through them, from 0 for nothing.
int gemm_fits_changed(const int64_t* sizes, int64_t n, int what, int64_t value) {
  GemmArgs args = make_args(sizes, n);
  Problem& problem = args.problems[0];
  Segment& segment = problem.segments[0];
  if (what == 1) args.dtype = static_cast<DType>(value);
  if (what == 2) args.count = static_cast<int>(value);
  if (what == 3) problem.m = value;
  if (what == 4) problem.segment_count = static_cast<int>(value);
  if (what == 5) problem.out = reinterpret_cast<float*>(value);
  if (what == 6) problem.ldo = value;
  if (what == 7) segment.a = reinterpret_cast<void*>(value);
  if (what == 8) segment.b = reinterpret_cast<void*>(value);
  if (what == 9) segment.lda = value;
  if (what == 10) segment.ldb = value;
  if (what == 11) segment.k = value;
  return gemm_fits(args);
}
}
