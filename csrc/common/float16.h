// fp16 and bf16 as bits, rounded to nearest even; the same integer code on host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace sphinx {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

SPHINX_HD uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

SPHINX_HD float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

SPHINX_HD float to_float(float value) {
  return value;
}
SPHINX_HD float to_float(BFloat16 value) {
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}
SPHINX_HD float to_float(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // inf, nan
  if (rest >= 0x0400u) return bits_float(sign | ((rest << 13) + 0x38000000u));         // normal: exponent 15 -> 127
  const float magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;           // subnormal: units of 2^-24
  return sign ? -magnitude : magnitude;
}

template <class T>
SPHINX_HD T from_float(float value);

template <>
SPHINX_HD float from_float<float>(float value) {
  return value;
}

template <>
SPHINX_HD BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // a nan stays one
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
SPHINX_HD Half from_float<Half>(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // nan
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to inf
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;  // normal
  } else {
    // Subnormal: adding 0.5 leaves, in the last bits of the sum, the value in units of 2^-24, rounded to nearest even.
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// `value` rounded to T and widened again: what a tensor operation of dtype T leaves behind.
template <class T>
SPHINX_HD float rounded(float value) {
  return to_float(from_float<T>(value));
}

}  // namespace sphinx
