// Vectors of floats, one type for each instruction set, so that a loop is written once as a template over V:
//   V::kWidth lanes of type V::F;  set(float), load(const T*) and store(T*, F) for every dtype T (store rounds),
//   pixels(const uint8_t*), even_odd(const uint8_t*, F&, F&) of 2 * kWidth bytes, gather(const float*, const int32_t*),
//   permute(from, index, base) = gather(from - base, index) of kWidth neighbours, add, sub, mul, fma,
//   divide(x, d, 1 / d) correctly rounded, max, exp2 of what is not positive, sum(F) and largest(F) of the lanes,
//   rounded<T>(F), and even(F, T), odd(F, T): the first and the second T of 2 bytes in each lane's word, widened.
// A file that includes this is compiled for one instruction set and sees the types up to it; all have internal linkage.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/float16.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace sphinx {
namespace {

// 2^x for x in [-1/2, 1/2]: coefficients of the polynomial of least relative error, 2e-9.
constexpr float kExp2[] = {
    1.53458120e-04f, 1.33999312e-03f, 9.61848896e-03f, 5.55032878e-02f, 2.40226469e-01f, 6.93147206e-01f, 1.0f};

template <class V>
inline typename V::F exp2_near_zero(typename V::F x) {
  typename V::F power = V::set(kExp2[0]);
  for (int i = 1; i < 7; ++i) power = V::fma(power, x, V::set(kExp2[i]));
  return power;
}

// One lane of plain C++: the tail of every loop, and all of it where neither instruction set is found.
struct Lane {
  using F = float;
  static constexpr int kWidth = 1;

  static F set(float value) { return value; }
  template <class T>
  static F load(const T* from) {
    return to_float(*from);
  }
  template <class T>
  static void store(T* to, F value) {
    *to = from_float<T>(value);
  }
  static F pixels(const uint8_t* from) { return static_cast<float>(*from); }
  static void even_odd(const uint8_t* from, F& even, F& odd) {
    even = static_cast<float>(from[0]);
    odd = static_cast<float>(from[1]);
  }
  static F gather(const float* from, const int32_t* index) { return from[*index]; }
  static F permute(const float* from, const int32_t* index, int base) { return from[*index - base]; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F divide(F x, F d, F) { return x / d; }
  static F max(F a, F b) { return b > a ? b : a; }
  static F exp2(F x) {  // results below the smallest normal number are 0
    if (x < -126 || x != x) return x < 0 ? 0 : x;
    const float whole = std::nearbyintf(x);
    const auto exponent = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    return exp2_near_zero<Lane>(x - whole) * bits_float(exponent);
  }

  static F even(F words, Half) { return to_float(Half{static_cast<uint16_t>(float_bits(words))}); }
  static F odd(F words, Half) { return to_float(Half{static_cast<uint16_t>(float_bits(words) >> 16)}); }
  static F even(F words, BFloat16) { return bits_float(float_bits(words) << 16); }
  static F odd(F words, BFloat16) { return bits_float(float_bits(words) & 0xffff0000u); }

  static float sum(F value) { return value; }
  static float largest(F value) { return value; }
  template <class T>
  static F rounded(F value) {
    return sphinx::rounded<T>(value);
  }
};

#ifdef __AVX2__
struct Eight {
  using F = __m256;
  static constexpr int kWidth = 8;

  static F set(float value) { return _mm256_set1_ps(value); }

  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static F load(const Half* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
  static F load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static void store(Half* to, F value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half_bits(value)); }
  static void store(BFloat16* to, F value) {
    const __m256i words = _mm256_srli_epi32(bfloat16_bits(value), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
  }

  static F pixels(const uint8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  }
  static void even_odd(const uint8_t* from, F& even, F& odd) {
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    even = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_and_si128(both, _mm_set1_epi16(0xff))));
    odd = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_srli_epi16(both, 8)));
  }

  static F gather(const float* from, const int32_t* index) {
    return _mm256_i32gather_ps(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), 4);
  }
  static F permute(const float* from, const int32_t* index, int base) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), _mm256_sub_epi32(all, _mm256_set1_epi32(base)));
  }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // Markstein: with the correctly rounded inverse of d, one correction of x * inverse is the correctly rounded x / d.
  static F divide(F x, F d, F inverse) {
    const F quotient = _mm256_mul_ps(x, inverse);
    return _mm256_fmadd_ps(_mm256_fnmadd_ps(quotient, d, x), inverse, quotient);
  }

  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F exp2(F x) {  // as Lane's
    const F whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    const F power = mul(exp2_near_zero<Eight>(sub(x, whole)), _mm256_castsi256_ps(exponent));
    return _mm256_and_ps(power, _mm256_cmp_ps(x, set(-126), _CMP_NLT_UQ));
  }

  static F even(F words, BFloat16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(words), 16)); }
  static F odd(F words, BFloat16) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(words), _mm256_set1_epi32(~0xffff)));
  }
  static F even(F words, Half) {
    const __m256i low = _mm256_and_si256(_mm256_castps_si256(words), _mm256_set1_epi32(0xffff));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }
  static F odd(F words, Half) {
    return even(_mm256_castsi256_ps(_mm256_srli_epi32(_mm256_castps_si256(words), 16)), Half{});
  }

  static float largest(F value) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static float sum(F value) {  // halves, quarters, eighths
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  template <class T>
  static F rounded(F value) {
    if constexpr (sizeof(T) == 4) {
      return value;
    } else {
      return rounded_to(value, T{});
    }
  }

 private:
  static __m128i half_bits(F value) { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // Nearest even of the upper 16 bits; a nan stays one.
  static __m256i bfloat16_bits(F value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(nearest, quiet, _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
  }
  static F rounded_to(F value, Half) { return _mm256_cvtph_ps(half_bits(value)); }
  static F rounded_to(F value, BFloat16) {
    return _mm256_castsi256_ps(_mm256_and_si256(bfloat16_bits(value), _mm256_set1_epi32(~0xffff)));
  }
};
#endif

#ifdef __AVX512F__
struct Sixteen {
  using F = __m512;
  static constexpr int kWidth = 16;

  static F set(float value) { return _mm512_set1_ps(value); }

  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static F load(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static F load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static void store(Half* to, F value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half_bits(value)); }
  static void store(BFloat16* to, F value) {
    const __m256i words = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bfloat16_bits(value), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
  }

  static F pixels(const uint8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static void even_odd(const uint8_t* from, F& even, F& odd) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    even = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_and_si256(both, _mm256_set1_epi16(0xff))));
    odd = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_srli_epi16(both, 8)));
  }

  static F gather(const float* from, const int32_t* index) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), from, 4);
  }
  static F permute(const float* from, const int32_t* index, int base) {
    const __m512i near = _mm512_sub_epi32(_mm512_loadu_si512(index), _mm512_set1_epi32(base));
    return _mm512_permutexvar_ps(near, _mm512_loadu_ps(from));
  }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F divide(F x, F d, F inverse) {  // as Eight's
    const F quotient = _mm512_mul_ps(x, inverse);
    return _mm512_fmadd_ps(_mm512_fnmadd_ps(quotient, d, x), inverse, quotient);
  }

  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F exp2(F x) {  // as Lane's
    const F whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, set(-126), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(normal, exp2_near_zero<Sixteen>(sub(x, whole)), whole);
  }

  static F even(F words, BFloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(words), 16)); }
  static F odd(F words, BFloat16) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(words), _mm512_set1_epi32(~0xffff)));
  }
  static F even(F words, Half) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_castps_si512(words))); }
  static F odd(F words, Half) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(words), 16)));
  }

  static float largest(F value) {
    return Eight::largest(_mm256_max_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1)));
  }
  static float sum(F value) {
    return Eight::sum(_mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1)));
  }

  template <class T>
  static F rounded(F value) {
    if constexpr (sizeof(T) == 4) {
      return value;
    } else {
      return rounded_to(value, T{});
    }
  }

 private:
  static __m256i half_bits(F value) { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m512i bfloat16_bits(F value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
  }
  static F rounded_to(F value, Half) { return _mm512_cvtph_ps(half_bits(value)); }
  static F rounded_to(F value, BFloat16) {
    return _mm512_castsi512_ps(_mm512_and_si512(bfloat16_bits(value), _mm512_set1_epi32(~0xffff)));
  }
};
#endif

}  // namespace
}  // namespace sphinx
