// Scores and sums without tensor cores: every dtype, every head_dim that is a multiple of 8. A thread has a position
// while it scores and an element of the values while it adds up, for all queries of the piece; what queries share is
// read once.
#pragma once

#include "attention/kernel.cuh"

namespace sphinx::attention {

template <class T>
class Plain {
 public:
  using Type = T;
  static constexpr int kBlocks = 4;  // on a multiprocessor, for which registers are left
  static constexpr int kMost = kSmallTile;

  // Beyond the scores: the queries, widened, and the new key.
  static size_t shared(const Plan& plan) { return plan.head_dim * (sizeof(float) * plan.tile + sizeof(T)); }

  __device__ Plain(const Plan& plan, const Meeting& meeting, unsigned char* shared)
      : plan_(plan), piece_(meeting.piece), meeting_(meeting), head_dim_(plan.head_dim) {
    queries_ = reinterpret_cast<float*>(shared);
    key_ = reinterpret_cast<T*>(queries_ + plan.tile * head_dim_);
  }

  __device__ void fetch() {}
  __device__ void wait() {}
  __device__ void set_query(int m, int i, T value) { queries_[m * head_dim_ + i] = to_float(value); }
  __device__ void set_key(int i, T value) { key_[i] = value; }
  __device__ void set_value(int, T) {}

  __device__ void score(float* scores, float scale) {
    const int position = threadIdx.x;
    if (position != piece_.fresh && !is_read(meeting_, position)) return;
    const bool fresh = position == piece_.fresh;
    const T* const key =
        fresh ? key_ : keys_of<const T>(plan_.args, piece_) + position * cache_of(plan_.args, piece_).key_row;
    const bool aligned = !fresh && reinterpret_cast<uintptr_t>(key) % 16 == 0;
    float sums[kMost] = {};
    for (int i = 0; i < head_dim_; i += kVector) {
      T own[kVector];
      if (aligned) {
        const uint4 words = __ldcg(reinterpret_cast<const uint4*>(key + i));
        memcpy(own, &words, sizeof(own));
      } else {
#pragma unroll
        for (int e = 0; e < kVector; ++e) own[e] = key[i + e];
      }
#pragma unroll
      for (int m = 0; m < kMost; ++m) {
        if (m >= piece_.count) break;
        float part = 0;  // few terms at a time: a long sum rounds more
#pragma unroll
        for (int e = 0; e < kVector; ++e) part += queries_[m * head_dim_ + i + e] * to_float(own[e]);
        sums[m] += part;
      }
    }
#pragma unroll
    for (int m = 0; m < kMost; ++m) {
      if (m < piece_.count) scores[m * kPitch + position] = sums[m] * scale;
    }
  }

  __device__ void add_up(const float* weights) {
    const T* const values = values_of<const T>(plan_.args, piece_);
    const T* const fresh =
        piece_.fresh < 0 ? nullptr : head_of<const T>(plan_.args.value, piece_.first, piece_.kv_head);
    const int64_t step = cache_of(plan_.args, piece_).value_row;
    for (int i = threadIdx.x; i < head_dim_; i += kThreads) {
      float sums[kMost] = {};
#pragma unroll 4
      for (int position = 0; position < piece_.length; ++position) {
        if (position != piece_.fresh && !is_read(meeting_, position)) continue;
        const float value = to_float(position == piece_.fresh ? fresh[i] : values[position * step + i]);
#pragma unroll
        for (int m = 0; m < kMost; ++m) {
          if (m < piece_.count) sums[m] += weights[m * kPitch + position] * value;
        }
      }
#pragma unroll
      for (int m = 0; m < kMost; ++m) {
        if (m >= piece_.count) break;
        if (float* const to = sums_of(plan_, meeting_, m)) to[i] = sums[m];
      }
    }
  }

 private:
  static constexpr int kVector = 16 / sizeof(T);

  const Plan& plan_;
  const Piece& piece_;
  const Meeting& meeting_;
  const int head_dim_;
  float* queries_;  // [tile, head_dim]
  T* key_;          // [head_dim]
};

}  // namespace sphinx::attention
