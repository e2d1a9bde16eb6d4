// The kernel of the room attention, in one launch. A block takes one split, up to 128 positions, of the keys and values
// of one KV head, and all queries that attend to it: it rotates them, scores every position, turns scores into weights
// and adds up the values. What it leaves is not finished: the largest score, the sum of the weights and the sums. The
// block that arrives last for a row and KV head merges the splits in the order of their positions, so that nothing
// depends on which one it is.
//
// How scores and sums are computed is `Inner`'s: plain.cuh takes everything, tensor.cuh is fast.
#pragma once

#include "attention/plan.h"
#include "common/dispatch.h"
#include "common/launch.cuh"
#include "common/vec.cuh"

namespace sphinx::attention {

// Scores lie in shared memory, [tile, kPitch], and become weights there; the pitch spreads rows over the banks.
constexpr int kPitch = kSplit + 4;

// What a block works on at a time. Query m is that of row first + m / span and head head + m % span.
struct Piece {
  bool prefix;
  int first, rows;
  int kv_head, head;
  int span, count;     // heads of a row, queries
  int64_t slot, base;  // positions base, base + 1, ... of this slot
  int length;          // so many, at most kSplit
  int fresh;  // the position, counted from base, of the new token, whose key and value come with the call; or -1
  int split;  // of the partial result
  const uint8_t* mask;  // of the first row, at `base`
};

// What a block's threads tell each other, and what all of them would know: registers are for keys.
struct Meeting {
  Block block;
  Piece piece;
  Row rows[kLargeTile];
  uint8_t wanted[kSplit];  // somebody attends to the position; where there is a mask
  bool last[kLargeTile];
};

__device__ __forceinline__ const Cache& cache_of(const Args& args, const Piece& piece) {
  return piece.prefix ? args.prefix : args.suffix;
}
template <class T>
__device__ __forceinline__ T* keys_of(const Args& args, const Piece& piece) {
  const Cache& cache = cache_of(args, piece);
  return static_cast<T*>(cache.key) + piece.slot * cache.key_slot + piece.kv_head * cache.key_head +
         piece.base * cache.key_row;
}
template <class T>
__device__ __forceinline__ T* values_of(const Args& args, const Piece& piece) {
  const Cache& cache = cache_of(args, piece);
  return static_cast<T*>(cache.value) + piece.slot * cache.value_slot + piece.kv_head * cache.value_head +
         piece.base * cache.value_row;
}
template <class T>
__device__ __forceinline__ T* head_of(const Heads& heads, int64_t row, int64_t head) {
  return static_cast<T*>(heads.data) + row * heads.row_step + head * heads.head_step;
}

// Whether a position of the piece is to be read from the cache.
__device__ __forceinline__ bool is_read(const Meeting& meeting, int position) {
  const Piece& piece = meeting.piece;
  return position < piece.length && position != piece.fresh && (!piece.mask || meeting.wanted[position]);
}

// --- one piece ---

// Queries are rotated here, once for the block, and rounded as the tensors they stand for would be.
template <class Inner>
__device__ void rotate_queries(const Plan& plan, const Meeting& meeting, Inner& inner) {
  const Piece& piece = meeting.piece;
  using T = typename Inner::Type;
  const int head_dim = plan.head_dim;
#pragma unroll 1
  for (int index = threadIdx.x; index < piece.count * head_dim; index += kThreads) {
    const int m = index / head_dim, i = index % head_dim, r = m / piece.span;
    const Row& row = meeting.rows[r];
    if (!row.valid) continue;
    const T* const from = head_of<const T>(plan.args.query, piece.first + r, piece.head + m % piece.span);
    inner.set_query(m, i, from_float<T>(rotated_at(from, i, plan.args.rope, row.position)));
  }
}

// The new token's key and value go to the cache, for later steps, and to where this block looks for them.
template <class Inner>
__device__ void append(const Plan& plan, const Meeting& meeting, Inner& inner) {
  const Piece& piece = meeting.piece;
  using T = typename Inner::Type;
  const Args& args = plan.args;
  const T* const key = head_of<const T>(args.key, piece.first, piece.kv_head);
  const T* const value = head_of<const T>(args.value, piece.first, piece.kv_head);
  const bool kept = piece.head == piece.kv_head * plan.shared_heads;  // one of the head tiles does it
  for (int i = threadIdx.x; i < plan.head_dim; i += kThreads) {
    const T rotated = from_float<T>(rotated_at(key, i, args.rope, meeting.rows[0].position));
    inner.set_key(i, rotated);
    inner.set_value(i, value[i]);
    if (kept) {
      keys_of<T>(args, piece)[piece.fresh * args.suffix.key_row + i] = rotated;
      values_of<T>(args, piece)[piece.fresh * args.suffix.value_row + i] = value[i];
    }
  }
}

__device__ __forceinline__ float warp_largest(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

// Scores -> weights exp2(score - largest), in place: a warp for each query, positions 32 apart in a thread.
__device__ __forceinline__ void weigh(const Plan& plan, const Meeting& meeting, float* scores) {
  const Piece& piece = meeting.piece;
  const int lane = threadIdx.x % 32;
  for (int m = threadIdx.x / 32; m < piece.count; m += kWarps) {
    const int r = m / piece.span;
    if (!meeting.rows[r].valid) continue;
    const uint8_t* const mask = piece.mask ? piece.mask + r * plan.args.mask_step : nullptr;
    float own[kSplit / 32], largest = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < kSplit / 32; ++i) {
      const int position = lane + 32 * i;
      const bool attended = position < piece.length && (!mask || mask[position]);
      own[i] = attended ? scores[m * kPitch + position] : -INFINITY;
      largest = fmaxf(largest, own[i]);  // a nan is passed over here, and spoils the sum
    }
    largest = warp_largest(largest);
#pragma unroll
    for (int i = 0; i < kSplit / 32; ++i) {
      const float weight = share(own[i], largest);
      scores[m * kPitch + lane + 32 * i] = weight;
      sum += weight;
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const int64_t entry = entry_of(plan, piece.first + r, piece.head + m % piece.span, piece.split);
      plan.softmax[entry] = {largest, sum};
    }
  }
}

// Where query m's unfinished sums go; NULL for a row that is invalid.
__device__ __forceinline__ float* sums_of(const Plan& plan, const Meeting& meeting, int m) {
  const Piece& piece = meeting.piece;
  const int r = m / piece.span;
  if (!meeting.rows[r].valid) return nullptr;
  const int64_t entry = entry_of(plan, piece.first + r, piece.head + m % piece.span, piece.split);
  return plan.sums + entry * plan.head_dim;
}

// --- the merge ---

// One head of a row, by a warp: lane t has elements 4 t, ... 4 t + 3, and the softmax of one split out of 32. Other
// multiprocessors wrote what is read here: not through the first cache.
template <class T>
__device__ void merge_head(const Plan& plan, int64_t r, const Row& row, int64_t head) {
  constexpr int kAhead = 8;  // splits on their way at a time
  const Args& args = plan.args;
  const int prefixes = static_cast<int>(ceil_div(row.prefix, kSplit));
  const int splits = prefixes + static_cast<int>(ceil_div(row.suffix, kSplit));
  const int gap = plan.prefix_splits - prefixes;  // between them, beyond the length of the prefix
  const int64_t first = entry_of(plan, r, head, 0);
  const int lane = threadIdx.x % 32, head_dim = plan.head_dim;
  const auto place = [&](int split) { return split < prefixes ? split : split + gap; };
  for (int from = 0; from < head_dim; from += 4 * 32) {
    const int i = from + 4 * lane;
    const float* const parts = plan.sums + first * head_dim + i;
    Softmax all{-INFINITY, 0};
    float sums[4] = {};
    float2 softmax = make_float2(0, 0);
    for (int begin = 0; begin < splits; begin += kAhead) {
      if (begin % 32 == 0 && begin + lane < splits) {
        softmax = __ldcg(reinterpret_cast<const float2*>(plan.softmax) + first + place(begin + lane));
      }
      float4 part[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const bool there = begin + k < splits && i < head_dim;
        part[k] = there ? __ldcg(reinterpret_cast<const float4*>(parts + place(begin + k) * head_dim))
                        : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (begin + k >= splits) break;
        const int at = (begin + k) % 32;
        const Softmax other{__shfl_sync(0xffffffffu, softmax.x, at), __shfl_sync(0xffffffffu, softmax.y, at)};
        const Weights weights = merge(all, other);
        sums[0] = sums[0] * weights.all + part[k].x * weights.other;
        sums[1] = sums[1] * weights.all + part[k].y * weights.other;
        sums[2] = sums[2] * weights.all + part[k].z * weights.other;
        sums[3] = sums[3] * weights.all + part[k].w * weights.other;
      }
    }
    if (i < head_dim) {
      Vec<T, 4> result;
#pragma unroll
      for (int e = 0; e < 4; ++e) result.value[e] = from_float<T>(all.sum == 0 ? 0.0f : sums[e] / all.sum);
      store(head_of<T>(args.out, r, head) + i, result, 4);
    }
    if (args.lse && i == 0) args.lse[r * args.heads + head] = log_sum_exp(all);
  }
}

// Counts this block in, for every row of the piece, and merges those for which it was the last.
template <class T>
__device__ void arrive(const Plan& plan, Meeting& meeting) {
  const Piece& piece = meeting.piece;
  __threadfence();  // what this thread wrote comes before the count
  __syncthreads();
  const int thread = threadIdx.x;
  if (thread < piece.rows) {
    const Row& row = meeting.rows[thread];
    meeting.last[thread] = false;
    if (row.valid) {
      int32_t* const arrived = plan.arrived + (piece.first + thread) * plan.args.kv_heads + piece.kv_head;
      const int64_t expected = plan.head_tiles * (ceil_div(row.prefix, kSplit) + ceil_div(row.suffix, kSplit));
      meeting.last[thread] = atomicAdd(arrived, 1) + 1 == expected;
      if (meeting.last[thread]) *arrived = 0;  // for the next launch
    }
    __threadfence();  // what others wrote comes after it
  }
  __syncthreads();
  for (int m = thread / 32; m < piece.rows * plan.shared_heads; m += kWarps) {
    const int r = m / plan.shared_heads;
    if (!meeting.last[r]) continue;
    merge_head<T>(plan, piece.first + r, meeting.rows[r], piece.kv_head * plan.shared_heads + m % plan.shared_heads);
  }
}

// --- the kernel ---

// Meets about the piece of split `split` for `count` rows from `first`; its length is 0 where there is nothing to do.
__device__ __forceinline__ void make_piece(const Plan& plan, int first, int count, int split, Meeting& meeting) {
  const Args& args = plan.args;
  const Block& block = meeting.block;
  const int thread = threadIdx.x;
  const int64_t base = static_cast<int64_t>(split) * kSplit;
  const uint8_t* const mask = block.prefix && args.mask ? args.mask + first * args.mask_step + base : nullptr;
  if (mask) {
    uint8_t wanted = 0;
    for (int r = 0; r < count && base + thread < args.prefix.capacity; ++r) wanted |= mask[r * args.mask_step + thread];
    meeting.wanted[thread] = wanted;
  }
  if (thread < 32) {
    if (thread < count) meeting.rows[thread] = row_of(args, first + thread);
    __syncwarp();
  }
  if (thread == 0) {
    int r = 0;  // prefixes of a group are the same
    while (r < count - 1 && !meeting.rows[r].valid) ++r;
    const Row& row = meeting.rows[r];
    const int64_t left = row.valid ? (block.prefix ? row.prefix : row.suffix) - base : 0;
    const int tile = block.head_tile * plan.tile, heads = plan.shared_heads - tile;
    Piece& piece = meeting.piece;
    piece.prefix = block.prefix;
    piece.first = first, piece.rows = count;
    piece.kv_head = block.kv_head, piece.head = block.kv_head * plan.shared_heads + tile;
    piece.span = heads < plan.tile ? heads : plan.tile, piece.count = count * piece.span;
    piece.slot = block.prefix ? row.picture : row.question, piece.base = base;
    piece.length = static_cast<int>(left < 0 ? 0 : left < kSplit ? left : kSplit);
    piece.fresh = !block.prefix && args.key.data && left <= kSplit ? piece.length - 1 : -1;
    piece.split = split + (block.prefix ? 0 : plan.prefix_splits);
    piece.mask = mask;
  }
  __syncthreads();
}

template <class Inner>
size_t shared_of(const Plan& plan) {
  return sizeof(float) * plan.tile * kPitch + Inner::shared(plan);
}

template <class Inner>
__device__ __forceinline__ void attend(const Plan& plan, Meeting& meeting, unsigned char* shared) {
  float* const scores = reinterpret_cast<float*>(shared);
  Inner inner(plan, meeting, shared + sizeof(float) * plan.tile * kPitch);
  inner.fetch();
  rotate_queries(plan, meeting, inner);
  if (meeting.piece.fresh >= 0) append(plan, meeting, inner);
  __syncthreads();
  inner.score(scores, plan.args.scale * kLog2e);
  __syncthreads();
  weigh(plan, meeting, scores);
  inner.wait();
  __syncthreads();
  inner.add_up(scores);
  arrive<typename Inner::Type>(plan, meeting);
}

// A row that nobody merges: invalid, or with nothing to attend to.
template <class T>
__device__ void fill(const Plan& plan, int64_t r, int64_t kv_head, float value, float lse) {
  const int64_t first = kv_head * plan.shared_heads;
  for (int index = threadIdx.x; index < plan.shared_heads * plan.head_dim; index += kThreads) {
    const int64_t head = first + index / plan.head_dim;
    head_of<T>(plan.args.out, r, head)[index % plan.head_dim] = from_float<T>(value);
    if (plan.args.lse) plan.args.lse[r * plan.args.heads + head] = lse;
  }
}

template <class Inner>
__global__ void __launch_bounds__(kThreads, Inner::kBlocks) attention_kernel(const __grid_constant__ Plan plan) {
  SPHINX_DYNAMIC_SHARED(shared);
  __shared__ Meeting meeting;
  const Args& args = plan.args;
  if (threadIdx.x == 0) meeting.block = block_of(plan, blockIdx.x);
  __syncthreads();
  const Block& block = meeting.block;
  int steps = static_cast<int>(args.rows) - block.row;  // rows of the tile, or splits of the row
  if (block.prefix) {
    if (steps > plan.rows_together) steps = plan.rows_together;
  } else {
    const Row row = row_of(args, block.row);
    steps = row.valid ? static_cast<int>(ceil_div(row.suffix, kSplit)) : 0;
    if (block.first == 0 && block.head_tile == 0 && (!row.valid || row.prefix + row.suffix == 0)) {
      fill<typename Inner::Type>(plan, block.row, block.kv_head, row.valid ? 0.0f : NAN, row.valid ? -INFINITY : NAN);
    }
  }
  for (int step = block.first; step < steps; step += block.step) {
    const int first = block.prefix ? block.row + step : block.row;
    const int rows = block.prefix ? static_cast<int>(group_of(args, first, plan.rows_together)) : 1;
    if (rows == 0) continue;
    make_piece(plan, first, rows, block.prefix ? block.split : step, meeting);
    if (meeting.piece.length > 0) attend<Inner>(plan, meeting, shared);
    __syncthreads();  // the next piece uses the same memory
  }
}

}  // namespace sphinx::attention
