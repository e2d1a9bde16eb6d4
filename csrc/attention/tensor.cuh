// Scores and sums on tensor cores, for 16-bit dtypes and head_dim 64 and 128. Keys go from memory straight to registers
// and values to shared memory, both on their way while the queries are rotated, so that a block waits for memory once.
//
// Scores: warp w has positions [32 w, 32 w + 32). Which element of a head is "column k" of a product is free as long as
// queries and keys agree. Thread (g, t), g = lane / 4, t = lane % 4, takes elements 32 j + 8 t, ... + 7 of key g of
// eight: one load of 16 bytes is its share of two products, and four threads read 64 bytes in a row.
// Sums: warp w has a quarter of the elements, over all positions: nothing is left to add between warps.
#pragma once

#include "attention/plain.cuh"
#include "common/mma.cuh"

namespace sphinx::attention {

template <class T, int kHeadDim>
class Tensor {
 public:
  using Type = T;
  static constexpr int kBlocks = 4;
  static constexpr int kMost = kLargeTile;

  // Beyond the scores: values, queries, the new key.
  static size_t shared(const Plan& plan) {
    return sizeof(T) * (kSplit * kHeadDim + plan.tile * kQueryPitch + kHeadDim);
  }

  __device__ Tensor(const Plan& plan, const Meeting& meeting, unsigned char* shared)
      : plan_(plan), piece_(meeting.piece), meeting_(meeting) {
    values_ = reinterpret_cast<T*>(shared);
    queries_ = values_ + kSplit * kHeadDim;
    key_ = queries_ + plan.tile * kQueryPitch;
  }

  __device__ void fetch() {
    const T* const keys = keys_of<const T>(plan_.args, piece_);
    const int64_t key_step = cache_of(plan_.args, piece_).key_row;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const int position = key_position(n);
      const bool there = is_read(meeting_, position);
      const T* const from = keys + position * key_step + column();
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        own_[n][j] = there ? __ldcg(reinterpret_cast<const uint4*>(from + 32 * j)) : make_uint4(0, 0, 0, 0);
      }
    }
    const T* const values = values_of<const T>(plan_.args, piece_);
    const int64_t value_step = cache_of(plan_.args, piece_).value_row;
    const int chunk = threadIdx.x % kChunks;
    for (int position = threadIdx.x / kChunks; position < in_sixteens(); position += kThreads / kChunks) {
      if (position == piece_.fresh) continue;
      copy_async(value_at(position, chunk), values + position * value_step + 8 * chunk, is_read(meeting_, position));
    }
  }

  __device__ void set_query(int m, int i, T value) { queries_[m * kQueryPitch + i] = value; }
  __device__ void set_key(int i, T value) { key_[i] = value; }
  __device__ void set_value(int i, T value) { value_at(piece_.fresh, i / 8)[i % 8] = value; }
  __device__ void wait() { wait_for_copies(); }

  __device__ void score(float* scores, float scale) {
    if (piece_.fresh >= 0) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        if (key_position(n) != piece_.fresh) continue;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) own_[n][j] = *reinterpret_cast<const uint4*>(key_ + 32 * j + column());
      }
    }
    if (32 * warp() >= piece_.length) return;
    for (int m = 0; m < piece_.count; m += 16) {
      float sums[kKeyTiles][4] = {};
      const T* const upper = queries_ + (m + group()) * kQueryPitch + column();
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const uint4 a = *reinterpret_cast<const uint4*>(upper + 32 * j);
        const uint4 b = *reinterpret_cast<const uint4*>(upper + 8 * kQueryPitch + 32 * j);
        const uint32_t first[4] = {a.x, b.x, a.y, b.y}, second[4] = {a.z, b.z, a.w, b.w};
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          multiply_add<T>(sums[n], first, own_[n][j].x, own_[n][j].y);
          multiply_add<T>(sums[n], second, own_[n][j].z, own_[n][j].w);
        }
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        float* const to = scores + (m + group()) * kPitch + 32 * warp() + 8 * n + 2 * within();
        *reinterpret_cast<float2*>(to) = make_float2(sums[n][0] * scale, sums[n][1] * scale);
        *reinterpret_cast<float2*>(to + 8 * kPitch) = make_float2(sums[n][2] * scale, sums[n][3] * scale);
      }
    }
  }

  __device__ void add_up(const float* weights) {
    const int lane = threadIdx.x % 32;
    for (int m = 0; m < piece_.count; m += 16) {
      float sums[kValueTiles][4] = {};
      const float* const upper = weights + (m + group()) * kPitch + 2 * within();
#pragma unroll
      for (int k = 0; k < kSplit; k += 16) {
        if (k >= piece_.length) break;
        const auto pair = [&](int row, int column) {
          const float2 two = *reinterpret_cast<const float2*>(upper + row * kPitch + k + column);
          return pack<T>(two.x, two.y);
        };
        const uint32_t a[4] = {pair(0, 0), pair(8, 0), pair(0, 8), pair(8, 8)};
#pragma unroll
        for (int n = 0; n < kValueTiles; n += 2) {
          uint32_t b[4];  // positions k, ... and k + 8, ...; then the same, eight elements on
          load_transposed(b, value_at(k + lane % 16, (warp() * kValueTiles + n) + lane / 16));
          multiply_add<T>(sums[n], a, b[0], b[1]);
          multiply_add<T>(sums[n + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m + group() + 8 * half;
        float* const to = row < piece_.count ? sums_of(plan_, meeting_, row) : nullptr;
        if (!to) continue;
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) {
          *reinterpret_cast<float2*>(to + 8 * (warp() * kValueTiles + n) + 2 * within()) =
              make_float2(sums[n][2 * half], sums[n][2 * half + 1]);
        }
      }
    }
  }

 private:
  static constexpr int kSteps = kHeadDim / 32;               // 16-byte loads across a key by four threads
  static constexpr int kKeyTiles = kSplit / kWarps / 8;      // of eight positions, of a warp
  static constexpr int kValueTiles = kHeadDim / kWarps / 8;  // of eight elements, of a warp
  static constexpr int kChunks = kHeadDim / 8;               // 16 bytes each, across a value
  static constexpr int kQueryPitch = kHeadDim + 32;          // two rows of 64 bytes fill the banks

  __device__ __forceinline__ int warp() const { return threadIdx.x / 32; }
  __device__ __forceinline__ int group() const { return threadIdx.x % 32 / 4; }
  __device__ __forceinline__ int within() const { return threadIdx.x % 4; }
  __device__ __forceinline__ int column() const { return 8 * within(); }
  __device__ __forceinline__ int key_position(int n) const { return 32 * warp() + 8 * n + group(); }
  __device__ __forceinline__ int in_sixteens() const { return (piece_.length + 15) / 16 * 16; }

  // Eight elements of a value. Chunks of eight neighbouring positions lie in different banks.
  __device__ __forceinline__ T* value_at(int position, int chunk) const {
    return values_ + position * kHeadDim + 8 * (chunk ^ position % 8);
  }

  const Plan& plan_;
  const Piece& piece_;
  const Meeting& meeting_;
  T *values_, *queries_, *key_;  // [kSplit, kHeadDim], [tile, kQueryPitch], [kHeadDim]
  uint4 own_[kKeyTiles][kSteps];
};

// For the host: calls f with the way to compute that fits the arguments, wrapped so that it need not be made.
template <class Inner>
struct Use {
  using type = Inner;
};
template <class F>
void dispatch_inner(const Args& args, F&& f, bool tensor_cores = true) {
  dispatch_float(args.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (tensor_cores && fits_tensor_cores(args)) {
        return args.head_dim == 64 ? f(Use<Tensor<T, 64>>{}) : f(Use<Tensor<T, 128>>{});
      }
    }
    f(Use<Plain<T>>{});
  });
}

}  // namespace sphinx::attention
