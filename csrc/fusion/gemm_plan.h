// The tiles of all problems of one GEMM launch as one list, and who computes which: index arithmetic, tested without a
// GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/host_device.h"
#include "fusion/gemm.h"

namespace sphinx::fusion::gemm {

constexpr int kTileM = 128;     // rows of a tile of any kernel
constexpr int kHopperK = 64;    // depth of one pipeline stage on Hopper: rows of 128 bytes, the swizzle's span
constexpr int kAmpereK = 32;    // and elsewhere
constexpr int kGroupRows = 64;  // rows of one of the two consumer warpgroups on Hopper

// What a kernel reads. Problems that have rows, the deepest first: a tile costs about as much as it is deep, and a list
// that starts with the expensive tiles ends evenly.
struct Plan {
  Segment segments[kMaxSegmentsInAll];  // of all problems, in the order of the problems
  float* out[kMaxProblems];
  int64_t ldo[kMaxProblems];
  int m[kMaxProblems];
  int steps[kMaxProblems];              // pipeline stages of a tile; no stage spans two segments
  int first_segment[kMaxProblems + 1];  // the last repeats the count, as in first_tile
  int first_tile[kMaxProblems + 1];
  int problems, n, columns;  // columns: of tiles
};

struct Tile {
  int problem, row, column;  // row and column of its first element
};

SPHINX_HD int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Row by row: the tiles that run together read the same rows of A, and a problem's last, ragged row of tiles, which
// costs less, comes last.
SPHINX_HD Tile tile_at(const Plan& plan, int index, int tile_n) {
  int problem = 0;
  while (index >= plan.first_tile[problem + 1]) ++problem;
  const int local = index - plan.first_tile[problem], row = local / plan.columns;
  return {problem, row * kTileM, (local - row * plan.columns) * tile_n};
}

SPHINX_HD int tile_count(const Plan& plan) {
  return plan.first_tile[plan.problems];
}

// The tile that block `block` of `blocks` computes as its `turn`-th. Every other round runs backwards, so that whoever
// had the deepest tile of one round has the shallowest of the next. Past the end once is past the end ever after.
SPHINX_HD int tile_of_turn(int turn, int block, int blocks) {
  return turn * blocks + (turn & 1 ? blocks - 1 - block : block);
}

inline Plan make_plan(const GemmArgs& args, int tile_n, int tile_k) {
  const auto steps = [&](const Problem& problem) {
    int sum = 0;
    for (int s = 0; s < problem.segment_count; ++s) sum += ceil_div(static_cast<int>(problem.segments[s].k), tile_k);
    return sum;
  };
  const Problem* order[kMaxProblems];
  const Problem** end = order;
  for (int p = 0; p < args.count; ++p) {
    if (args.problems[p].m > 0) *end++ = &args.problems[p];
  }
  std::stable_sort(order, end, [&](const Problem* a, const Problem* b) { return steps(*a) > steps(*b); });

  Plan plan{};
  plan.problems = static_cast<int>(end - order);
  plan.n = static_cast<int>(args.n);
  plan.columns = ceil_div(plan.n, tile_n);
  for (int p = 0; p < plan.problems; ++p) {
    const Problem& problem = *order[p];
    plan.out[p] = problem.out;
    plan.ldo[p] = problem.ldo;
    plan.m[p] = static_cast<int>(problem.m);
    plan.steps[p] = steps(problem);
    std::copy_n(problem.segments, problem.segment_count, plan.segments + plan.first_segment[p]);
    plan.first_segment[p + 1] = plan.first_segment[p] + problem.segment_count;
    plan.first_tile[p + 1] = plan.first_tile[p] + ceil_div(plan.m[p], kTileM) * plan.columns;
  }
  return plan;
}

// Cycles that Hopper's shared memory, at 128 bytes each, needs for a tile. TMA writes each stage once; a warpgroup that
// has rows reads, for 16 of k, its 64 rows of A and all columns of B. For a full tile of 256 columns that is also the
// time of the tensor cores, for one of 128 it is a quarter more. On top: filling the pipeline and storing the result.
inline int64_t hopper_cost(int steps, int tile_n, bool both_groups) {
  const int64_t written = (kTileM + tile_n) * kHopperK * 2, read = (kGroupRows + tile_n) * kHopperK * 2;
  return (steps * (written + (both_groups ? 2 : 1) * read) + kTileM * tile_n * 8) / 128;
}

// The time of the slowest of `blocks` blocks, in those cycles. An estimate that chooses between tile shapes, no more.
inline int64_t hopper_makespan(const Plan& plan, int tile_n, int blocks) {
  std::vector<int64_t> busy(blocks);
  for (int turn = 0; turn * blocks < tile_count(plan); ++turn) {
    for (int block = 0; block < blocks; ++block) {
      const int index = tile_of_turn(turn, block, blocks);
      if (index >= tile_count(plan)) continue;
      const Tile tile = tile_at(plan, index, tile_n);
      busy[block] += hopper_cost(plan.steps[tile.problem], tile_n, plan.m[tile.problem] - tile.row > kGroupRows);
    }
  }
  return *std::max_element(busy.begin(), busy.end());
}

// 256 columns where there is work for many rounds, the better of both where the last round decides.
inline int hopper_tile_n(const GemmArgs& args, int blocks) {
  constexpr int kManyRounds = 8;
  const Plan wide = make_plan(args, 256, kHopperK);
  if (tile_count(wide) / blocks >= kManyRounds) return 256;
  const Plan narrow = make_plan(args, 128, kHopperK);
  return hopper_makespan(wide, 256, blocks) <= hopper_makespan(narrow, 128, blocks) ? 256 : 128;
}

}  // namespace sphinx::fusion::gemm
