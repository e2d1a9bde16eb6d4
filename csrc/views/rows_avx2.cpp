// The loops of rows.h for AVX2, FMA and F16C.
#include <immintrin.h>

#include "views/rows_common.h"

namespace sphinx::views {
namespace {

__m256i two(const uint8_t* low, const uint8_t* high) {
  const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low)));
  return _mm256_inserti128_si256(first, _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

__m256i both_lanes(__m128i value) {
  return _mm256_broadcastsi128_si256(value);
}

__m256i pair(const int16_t* weights) {
  int32_t bits;
  __builtin_memcpy(&bits, weights, 4);
  return _mm256_set1_epi32(bits);
}

constexpr char kNone = -128;

// Pixels -> 128 bytes for every two: 128 bits a row, which hold two pixels' red, green and blue as 16-bit pairs, so
// that one multiply-add serves two taps of three colours of two rows.
void pair_pixels(const uint8_t* const* lines, int64_t low, int64_t high, uint8_t* scratch) {
  const __m256i first =
      both_lanes(_mm_setr_epi8(0, kNone, 3, kNone, 1, kNone, 4, kNone, 2, kNone, 5, kNone, kNone, kNone, kNone, kNone));
  const __m256i next = both_lanes(
      _mm_setr_epi8(6, kNone, 9, kNone, 7, kNone, 10, kNone, 8, kNone, 11, kNone, kNone, kNone, kNone, kNone));
  for (int64_t x = low; x < high; x += 4, scratch += 256) {
    for (int r = 0; r < 4; ++r) {
      const __m256i bytes = two(lines[2 * r] + x * 3, lines[2 * r + 1] + x * 3);
      _mm256_store_si256(reinterpret_cast<__m256i*>(scratch + 32 * r), _mm256_shuffle_epi8(bytes, first));
      _mm256_store_si256(reinterpret_cast<__m256i*>(scratch + 128 + 32 * r), _mm256_shuffle_epi8(bytes, next));
    }
  }
}

void horizontal(const uint8_t* const* lines, uint8_t* const* results, int64_t plane, const Taps& taps,
                uint8_t* scratch) {
  const __m256i planar = both_lanes(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int x = 0; x < taps.out; x += 4) {
    const int32_t* span = taps.spans + x / kPlaneUnit * 2;
    if (x % kPlaneUnit == 0) pair_pixels(lines, span[0], span[1], scratch);  // so few that they stay in the cache
    __m256i sums[4][4];
    for (int k = 0; k < 4; ++k) {
      const uint8_t* pixels = scratch + static_cast<int64_t>(taps.first[x + k] - span[0]) * kScratch;
      const int16_t* weights = taps.weights + static_cast<int64_t>(x + k) * taps.stride;
      __m256i high[4], low[4];
      for (int r = 0; r < 4; ++r) high[r] = low[r] = _mm256_setzero_si256();
      for (int left = taps.count[x + k]; left > 0; left -= 2, pixels += 128, weights += 4) {
        const __m256i h = pair(weights), l = pair(weights + 2);
        for (int r = 0; r < 4; ++r) {
          const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(pixels + 32 * r));
          high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(both, h));
          low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(both, l));
        }
      }
      const __m256i start =
          both_lanes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(taps.start + static_cast<int64_t>(x + k) * 4)));
      for (int r = 0; r < 4; ++r) {
        const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(high[r], 8), _mm256_add_epi32(low[r], start));
        sums[r][k] = _mm256_srai_epi32(sum, kWeightBits);
      }
    }
    for (int r = 0; r < 4; ++r) {
      const __m256i packed =
          _mm256_packus_epi16(_mm256_packs_epi32(sums[r][0], sums[r][1]), _mm256_packs_epi32(sums[r][2], sums[r][3]));
      alignas(32) uint32_t words[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(words), _mm256_shuffle_epi8(packed, planar));
      for (int lane = 0; lane < 2; ++lane) {
        for (int c = 0; c < 3; ++c) {
          __builtin_memcpy(results[2 * r + lane] + c * plane + x, words + 4 * lane + c, 4);
        }
      }
    }
  }
}

void vertical(const uint8_t* const* lines, const int16_t* weights, int count, int64_t bytes, uint8_t* result) {
  const __m256i zero = _mm256_setzero_si256(), half = _mm256_set1_epi32(kRoundHalf);
  for (int64_t begin = 0; begin < bytes; begin += 32) {
    __m256i high[4] = {zero, zero, zero, zero}, low[4] = {half, half, half, half};
    const int16_t* own = weights;
    for (int i = 0; i < count; i += 2, own += 4) {
      const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines[i] + begin));
      const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lines[i + 1] + begin));
      const __m256i left = _mm256_unpacklo_epi8(upper, lower), right = _mm256_unpackhi_epi8(upper, lower);
      const __m256i pairs[4] = {_mm256_unpacklo_epi8(left, zero), _mm256_unpackhi_epi8(left, zero),
                                _mm256_unpacklo_epi8(right, zero), _mm256_unpackhi_epi8(right, zero)};
      const __m256i h = pair(own), l = pair(own + 2);
      for (int k = 0; k < 4; ++k) {
        high[k] = _mm256_add_epi32(high[k], _mm256_madd_epi16(pairs[k], h));
        low[k] = _mm256_add_epi32(low[k], _mm256_madd_epi16(pairs[k], l));
      }
    }
    for (int k = 0; k < 4; ++k) {
      high[k] = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high[k], 8), low[k]), kWeightBits);
    }
    const __m256i packed =
        _mm256_packus_epi16(_mm256_packs_epi32(high[0], high[1]), _mm256_packs_epi32(high[2], high[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(result + begin), packed);
  }
}

}  // namespace

const Rows& rows_avx2() {
  static const Rows rows{
      "avx2",      horizontal,
      vertical,    filter_row<Eight>,
      pick<Eight>, {make_emit<Eight, float>(), make_emit<Eight, Half>(), make_emit<Eight, BFloat16>()}};
  return rows;
}

}  // namespace sphinx::views
