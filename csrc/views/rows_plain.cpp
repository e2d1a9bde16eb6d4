// The loops of rows.h in plain C++: what they compute, and what runs where neither AVX2 nor AVX-512 is found.
#include "views/rows_common.h"

namespace sphinx::views {
namespace {

int32_t weight_of(const int16_t* weights, int tap) {
  const int16_t* pair = weights + tap / 2 * 4 + tap % 2;
  return pair[0] * 256 + pair[2];
}

void horizontal(const uint8_t* const* lines, uint8_t* const* results, int64_t plane, const Taps& taps, uint8_t*) {
  for (int row = 0; row < kGroup; ++row) {
    for (int x = 0; x < taps.out; ++x) {
      const uint8_t* pixel = lines[row] + static_cast<int64_t>(taps.first[x]) * 3;
      const int16_t* weights = taps.weights + static_cast<int64_t>(x) * taps.stride;
      uint32_t sums[3];
      for (int c = 0; c < 3; ++c) sums[c] = static_cast<uint32_t>(taps.start[x * 4 + c]);
      for (int i = 0; i < taps.count[x]; ++i, pixel += 3) {
        const int32_t weight = weight_of(weights, i);
        for (int c = 0; c < 3; ++c) sums[c] += static_cast<uint32_t>(pixel[c] * weight);
      }
      for (int c = 0; c < 3; ++c) results[row][c * plane + x] = clip8(static_cast<int32_t>(sums[c]));
    }
  }
}

void vertical(const uint8_t* const* lines, const int16_t* weights, int count, int64_t bytes, uint8_t* result) {
  constexpr int kBlock = 64;
  for (int64_t begin = 0; begin < bytes; begin += kBlock) {
    uint32_t sums[kBlock];
    for (uint32_t& sum : sums) sum = kRoundHalf;
    for (int i = 0; i < count; ++i) {
      const uint8_t* line = lines[i] + begin;
      const int32_t weight = weight_of(weights, i);
      for (int x = 0; x < kBlock; ++x) sums[x] += static_cast<uint32_t>(line[x] * weight);
    }
    for (int x = 0; x < kBlock; ++x) result[begin + x] = clip8(static_cast<int32_t>(sums[x]));
  }
}

}  // namespace

const Rows& rows_plain() {
  static const Rows rows{"plain",    horizontal,
                         vertical,   filter_row<Lane>,
                         pick<Lane>, {make_emit<Lane, float>(), make_emit<Lane, Half>(), make_emit<Lane, BFloat16>()}};
  return rows;
}

}  // namespace sphinx::views
