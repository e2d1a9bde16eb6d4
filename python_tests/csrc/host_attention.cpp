// The CUDA kernels of the room attention, and the arithmetic both halves share, as a C library for ctypes.
#include <cuda_runtime.h>  // host_cuda's

#include <numeric>
#include <random>

#include "attention/tensor.cuh"

using namespace sphinx;
using namespace sphinx::attention;

namespace {

// The blocks from 0 on, from the last on, or shuffled.
std::vector<unsigned> order_of(unsigned blocks, unsigned order) {
  std::vector<unsigned> made(blocks);
  std::iota(made.begin(), made.end(), 0u);
  if (order == 1) std::reverse(made.begin(), made.end());
  if (order > 1) std::shuffle(made.begin(), made.end(), std::mt19937(order));
  return made;
}

template <class Inner>
Plan plan_of(const Args& args, int64_t enough_blocks) {
  return make_plan(args, Inner::kMost, enough_blocks);
}

}  // namespace

extern "C" {

int64_t size_of_args() {
  return sizeof(Args);
}

int takes_tensor_cores(const Args* args) {
  return fits_tensor_cores(*args);
}

int64_t partial_floats_of(const Args* args) {
  return floats_of(*args);
}

// What run_cuda in launch.cu does; 1 when no block left its shared memory.
int attention_on_host(const Args* args, float* partial, int32_t* arrived, int tensor_cores, int64_t enough_blocks,
                      unsigned order) {
  if (args->rows == 0) return 1;
  bool kept = false;
  dispatch_inner(
      *args,
      [&](auto use) {
        using Inner = typename decltype(use)::type;
        Plan plan = plan_of<Inner>(*args, enough_blocks);
        place(plan, partial, arrived);
        const auto blocks = static_cast<unsigned>(plan.blocks);
        kept = launch_on_host({blocks, 1, 1}, kThreads, shared_of<Inner>(plan), attention_kernel<Inner>, plan,
                              order_of(blocks, order));
      },
      tensor_cores != 0);
  return kept;
}

// How the launch is cut: tile, head_tiles, rows_together, row_tiles, prefix_deal, suffix_deal, prefix_blocks, blocks.
void plan_numbers(const Args* args, int64_t enough_blocks, int64_t* to) {
  const Plan plan = make_plan(*args, kLargeTile, enough_blocks);
  for (int64_t number : {plan.tile, plan.head_tiles, plan.rows_together, plan.row_tiles, plan.prefix_deal,
                         plan.suffix_deal, plan.prefix_blocks, plan.blocks}) {
    *to++ = number;
  }
}
// prefix, kv_head, head_tile, row, split, first, step
void block_numbers(const Args* args, int64_t enough_blocks, unsigned index, int64_t* to) {
  const Block block = block_of(make_plan(*args, kLargeTile, enough_blocks), index);
  for (int64_t number : {static_cast<int>(block.prefix), block.kv_head, block.head_tile, block.row, block.split,
                         block.first, block.step}) {
    *to++ = number;
  }
}

// The shared arithmetic.
int row_numbers(const Args* args, int64_t r, int64_t* to) {
  const Row row = row_of(*args, r);
  for (int64_t number : {row.picture, row.question, row.prefix, row.suffix, row.position}) *to++ = number;
  return row.valid;
}
int64_t group_size(const Args* args, int64_t first, int64_t most) {
  return group_of(*args, first, most);
}
float rotated_element(const float* from, int64_t i, const Rope* rope, int64_t position) {
  return rotated_at(from, i, *rope, position);
}
void merge_into(float* all, const float* other, float* weights) {
  Softmax sum{all[0], all[1]};
  const Weights made = merge(sum, {other[0], other[1]});
  all[0] = sum.largest, all[1] = sum.sum, weights[0] = made.all, weights[1] = made.other;
}
float log_sum_exp_of(float largest, float sum) {
  return log_sum_exp({largest, sum});
}

}  // extern "C"
