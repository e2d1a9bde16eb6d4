// The loops of rows.h for AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#include "views/rows_common.h"

namespace sphinx::views {
namespace {

__m128i sixteen_bytes(const uint8_t* from) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

// 16 bytes of each of four rows.
__m512i four(const uint8_t* const* lines, int64_t at) {
  __m512i bytes = _mm512_castsi128_si512(sixteen_bytes(lines[0] + at));
  bytes = _mm512_mask_broadcast_i32x4(bytes, 0x00f0, sixteen_bytes(lines[1] + at));
  bytes = _mm512_mask_broadcast_i32x4(bytes, 0x0f00, sixteen_bytes(lines[2] + at));
  return _mm512_mask_broadcast_i32x4(bytes, 0xf000, sixteen_bytes(lines[3] + at));
}

__m512i all_lanes(__m128i value) {
  return _mm512_broadcast_i32x4(value);
}

__m512i pair(const int16_t* weights) {
  int32_t bits;
  __builtin_memcpy(&bits, weights, 4);
  return _mm512_set1_epi32(bits);
}

constexpr char kNone = -128;

// Pixels -> 128 bytes for every two: 128 bits a row, which hold two pixels' red, green and blue as 16-bit pairs, so
// that one multiply-add serves two taps of three colours of four rows.
void pair_pixels(const uint8_t* const* lines, int64_t low, int64_t high, uint8_t* scratch) {
  const __m512i first =
      all_lanes(_mm_setr_epi8(0, kNone, 3, kNone, 1, kNone, 4, kNone, 2, kNone, 5, kNone, kNone, kNone, kNone, kNone));
  const __m512i next = all_lanes(
      _mm_setr_epi8(6, kNone, 9, kNone, 7, kNone, 10, kNone, 8, kNone, 11, kNone, kNone, kNone, kNone, kNone));
  for (int64_t x = low; x < high; x += 4, scratch += 256) {
    const __m512i upper = four(lines, x * 3), lower = four(lines + 4, x * 3);
    _mm512_store_si512(scratch, _mm512_shuffle_epi8(upper, first));
    _mm512_store_si512(scratch + 64, _mm512_shuffle_epi8(lower, first));
    _mm512_store_si512(scratch + 128, _mm512_shuffle_epi8(upper, next));
    _mm512_store_si512(scratch + 192, _mm512_shuffle_epi8(lower, next));
  }
}

void horizontal(const uint8_t* const* lines, uint8_t* const* results, int64_t plane, const Taps& taps,
                uint8_t* scratch) {
  const __m512i planar = all_lanes(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  for (int x = 0; x < taps.out; x += 4) {
    const int32_t* span = taps.spans + x / kPlaneUnit * 2;
    if (x % kPlaneUnit == 0) pair_pixels(lines, span[0], span[1], scratch);  // so few that they stay in the cache
    __m512i sums[2][4];
    for (int k = 0; k < 4; ++k) {
      const uint8_t* pixels = scratch + static_cast<int64_t>(taps.first[x + k] - span[0]) * kScratch;
      const int16_t* weights = taps.weights + static_cast<int64_t>(x + k) * taps.stride;
      __m512i high[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      __m512i low[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int left = taps.count[x + k]; left > 0; left -= 2, pixels += 128, weights += 4) {
        const __m512i h = pair(weights), l = pair(weights + 2);
        for (int r = 0; r < 2; ++r) {
          const __m512i both = _mm512_load_si512(pixels + 64 * r);
          high[r] = _mm512_add_epi32(high[r], _mm512_madd_epi16(both, h));
          low[r] = _mm512_add_epi32(low[r], _mm512_madd_epi16(both, l));
        }
      }
      const __m512i start =
          all_lanes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(taps.start + static_cast<int64_t>(x + k) * 4)));
      for (int r = 0; r < 2; ++r) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), _mm512_add_epi32(low[r], start));
        sums[r][k] = _mm512_srai_epi32(sum, kWeightBits);
      }
    }
    for (int r = 0; r < 2; ++r) {
      const __m512i packed =
          _mm512_packus_epi16(_mm512_packs_epi32(sums[r][0], sums[r][1]), _mm512_packs_epi32(sums[r][2], sums[r][3]));
      alignas(64) uint32_t words[16];
      _mm512_store_si512(words, _mm512_shuffle_epi8(packed, planar));
      for (int row = 0; row < 4; ++row) {
        for (int c = 0; c < 3; ++c) __builtin_memcpy(results[4 * r + row] + c * plane + x, words + 4 * row + c, 4);
      }
    }
  }
}

void vertical(const uint8_t* const* lines, const int16_t* weights, int count, int64_t bytes, uint8_t* result) {
  const __m512i zero = _mm512_setzero_si512(), half = _mm512_set1_epi32(kRoundHalf);
  for (int64_t begin = 0; begin < bytes; begin += 64) {
    __m512i high[4] = {zero, zero, zero, zero}, low[4] = {half, half, half, half};
    const int16_t* own = weights;
    for (int i = 0; i < count; i += 2, own += 4) {
      const __m512i upper = _mm512_loadu_si512(lines[i] + begin), lower = _mm512_loadu_si512(lines[i + 1] + begin);
      const __m512i left = _mm512_unpacklo_epi8(upper, lower), right = _mm512_unpackhi_epi8(upper, lower);
      const __m512i pairs[4] = {_mm512_unpacklo_epi8(left, zero), _mm512_unpackhi_epi8(left, zero),
                                _mm512_unpacklo_epi8(right, zero), _mm512_unpackhi_epi8(right, zero)};
      const __m512i h = pair(own), l = pair(own + 2);
      for (int k = 0; k < 4; ++k) {
        high[k] = _mm512_add_epi32(high[k], _mm512_madd_epi16(pairs[k], h));
        low[k] = _mm512_add_epi32(low[k], _mm512_madd_epi16(pairs[k], l));
      }
    }
    for (int k = 0; k < 4; ++k) {
      high[k] = _mm512_srai_epi32(_mm512_add_epi32(_mm512_slli_epi32(high[k], 8), low[k]), kWeightBits);
    }
    const __m512i packed =
        _mm512_packus_epi16(_mm512_packs_epi32(high[0], high[1]), _mm512_packs_epi32(high[2], high[3]));
    _mm512_storeu_si512(result + begin, packed);
  }
}

}  // namespace

const Rows& rows_avx512() {
  static const Rows rows{
      "avx512",      horizontal,
      vertical,      filter_row<Sixteen>,
      pick<Sixteen>, {make_emit<Sixteen, float>(), make_emit<Sixteen, Half>(), make_emit<Sixteen, BFloat16>()}};
  return rows;
}

}  // namespace sphinx::views
