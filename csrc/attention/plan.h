// How the room attention is cut into blocks: from what the host knows, extents and capacities, so that a launch that a
// graph keeps serves other lengths. Nothing here changes a result: splits of positions are fixed, and a row's scores,
// weights and sums are its own whoever shares its block.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "attention/math.h"
#include "common/check.h"

namespace sphinx::attention {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kSplit = 128;  // positions of a split
// Queries, pairs of a row and a head, that a block holds: one tile of tensor cores, all that the plain kernel takes, or
// two.
constexpr int kSmallTile = 16, kLargeTile = 32;
constexpr int64_t kEnoughBlocks = 2048;  // fill every GPU; more would only find that there is nothing left for them

// Blocks come in two kinds. A prefix block takes one split of prefixes, for some of `rows_together` neighbouring rows:
// groups of one picture read it together. A suffix block takes some of the splits of one row's suffix; the first one
// also answers for rows that are invalid or have nothing to attend to.
struct Plan {
  Args args;
  Softmax* softmax;  // [rows, heads, splits] unfinished: of the scores
  float* sums;       // [rows, heads, splits, head_dim] and of the values
  int32_t* arrived;  // [rows, kv_heads]
  int head_dim;
  int tile;          // queries for which a block has memory
  int shared_heads;  // heads that share keys and values
  int head_tiles;    // in how many parts, where they are too many for a tile
  int rows_together, row_tiles;
  int prefix_splits, suffix_splits;  // that the capacities hold
  int prefix_deal, suffix_deal;      // blocks among which a tile's groups, a row's splits, are dealt out
  int prefix_blocks, blocks;
};

// The partial result of a row, head and split.
SPHINX_HD int64_t entry_of(const Plan& plan, int64_t row, int64_t head, int split) {
  return (row * plan.args.heads + head) * (plan.prefix_splits + plan.suffix_splits) + split;
}

// What a block is.
struct Block {
  bool prefix;
  int kv_head, head_tile;
  int row;    // the first of its tile, or its own
  int split;  // of a prefix block
  int first, step;
};

SPHINX_HD Block block_of(const Plan& plan, unsigned index) {
  Block block{};
  block.prefix = index < static_cast<unsigned>(plan.prefix_blocks);
  if (!block.prefix) index -= plan.prefix_blocks;
  const auto take = [&](int count) {
    const int digit = static_cast<int>(index % count);
    index /= count;
    return digit;
  };
  block.step = block.prefix ? plan.prefix_deal : plan.suffix_deal;
  block.first = take(block.step);
  // Tiles of rows that read the same split lie together, so that one of them finds it in the cache.
  block.row = block.prefix ? take(plan.row_tiles) * plan.rows_together : take(plan.args.rows);
  block.split = block.prefix ? take(plan.prefix_splits) : 0;
  block.head_tile = take(plan.head_tiles);
  block.kv_head = static_cast<int>(index);
  return block;
}

// Blocks that share the work of `count` units, each of which `most` could share.
inline int deal_of(int64_t enough, int64_t count, int64_t most) {
  return static_cast<int>(std::max<int64_t>(1, std::min(most, ceil_div(enough, std::max<int64_t>(1, count)))));
}

// Whether rows of 16 bytes start where 16-byte loads may.
inline bool lies_in_vectors(const void* data, std::initializer_list<int64_t> steps) {
  bool whole = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int64_t step : steps) whole = whole && step % 8 == 0;
  return whole;
}
inline bool lies_in_vectors(const Cache& cache) {
  return cache.slots == 0 || (lies_in_vectors(cache.key, {cache.key_slot, cache.key_head, cache.key_row}) &&
                              lies_in_vectors(cache.value, {cache.value_slot, cache.value_head, cache.value_row}));
}

// Whether the kernel for tensor cores takes these arguments. The other one takes all.
inline bool fits_tensor_cores(const Args& args) {
  return args.dtype != DType::f32 && (args.head_dim == 64 || args.head_dim == 128) && lies_in_vectors(args.prefix) &&
         lies_in_vectors(args.suffix);
}

// Partial results lie in one piece of memory, aligned to 16 bytes: first Softmax, then sums. What it takes depends on
// rows, heads, head_dim and capacities alone.
inline int64_t entries_of(const Args& args) {
  const int64_t splits = ceil_div(args.prefix.capacity, kSplit) + ceil_div(args.suffix.capacity, kSplit);
  return checked_mul(checked_mul(args.rows, args.heads, "query"), splits, "query");
}
inline int64_t softmax_floats(const Args& args) {
  return ceil_div(2 * entries_of(args), 4) * 4;
}
inline int64_t floats_of(const Args& args) {
  return checked_add(softmax_floats(args), checked_mul(entries_of(args), args.head_dim, "query"), "query");
}
inline void place(Plan& plan, float* partial, int32_t* arrived) {
  check(reinterpret_cast<uintptr_t>(partial) % 16 == 0, "workspace partial: expected memory aligned to 16 bytes");
  plan.softmax = reinterpret_cast<Softmax*>(partial);
  plan.sums = partial + softmax_floats(plan.args);
  plan.arrived = arrived;
}

inline Plan make_plan(const Args& args, int most_queries, int64_t enough_blocks = kEnoughBlocks) {
  Plan plan{};
  plan.args = args;
  plan.head_dim = static_cast<int>(args.head_dim);
  plan.shared_heads = static_cast<int>(args.heads / args.kv_heads);
  const int64_t queries = checked_mul(args.rows, plan.shared_heads, "query");
  plan.tile = queries > kSmallTile ? most_queries : kSmallTile;
  plan.head_tiles = static_cast<int>(ceil_div(plan.shared_heads, plan.tile));
  plan.rows_together = plan.head_tiles > 1 ? 1 : plan.tile / plan.shared_heads;
  plan.row_tiles = static_cast<int>(ceil_div(args.rows, plan.rows_together));
  plan.prefix_splits = static_cast<int>(ceil_div(args.prefix.capacity, kSplit));
  plan.suffix_splits = static_cast<int>(ceil_div(args.suffix.capacity, kSplit));

  const int64_t units = args.kv_heads * plan.head_tiles;
  const int64_t prefix = checked_mul(plan.row_tiles * int64_t{plan.prefix_splits}, units, "prefix");
  const int64_t suffix = checked_mul(args.rows, units, "suffix");
  plan.prefix_deal = deal_of(enough_blocks, prefix, std::min<int64_t>(plan.rows_together, args.rows));
  plan.suffix_deal = deal_of(enough_blocks, suffix, plan.suffix_splits);
  const int64_t blocks = checked_add(checked_mul(prefix, plan.prefix_deal, "prefix"),
                                     checked_mul(suffix, plan.suffix_deal, "suffix"), "query");
  check(blocks <= 0x7fffffff, "query: expected work for at most 2^31 - 1 blocks, got ", blocks);
  plan.prefix_blocks = static_cast<int>(prefix * plan.prefix_deal);
  plan.blocks = static_cast<int>(blocks);
  return plan;
}

}  // namespace sphinx::attention
