// float16 and bfloat16 in plain C++, rounded to nearest, ties to even.
#pragma once

#include <cstring>

#include "activations.h"

namespace vitoats {
namespace {

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline float from_float16(Float16 half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000) << 16, magnitude = half.bits & 0x7fff;
  if (magnitude < 0x400) {  // subnormal as a half, but not as a float
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t exponents = magnitude < 0x7c00 ? 112u : 224u;  // between both biases; infinity and NaN keep the largest one
  return from_bits(sign | ((magnitude << 13) + (exponents << 23)));
}

// Numbers above the largest one become that one.
inline Float16 to_float16(float v) {
  const uint32_t sign = bits_of(v) >> 16 & 0x8000, magnitude = bits_of(v) & 0x7fffffff;
  const auto half = [sign](uint32_t bits) { return Float16{static_cast<uint16_t>(sign | bits)}; };
  if (v != v) return half(0x7e00);
  if (v > kLargestFloat16) return half(0x7bff);
  if (magnitude < 0x38800000) return half(static_cast<uint32_t>(__builtin_nearbyintf(from_bits(magnitude) * 0x1p24f)));
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return half(rounded < 0x47800000 ? (rounded - (112u << 23)) >> 13 : 0x7c00);
}

inline BFloat16 to_bfloat16(float v) {
  const uint32_t bits = bits_of(v);
  return {static_cast<uint16_t>((v == v ? bits + (bits >> 16 & 1) + 0x7fff : kNaN) >> 16)};
}

}  // namespace
}  // namespace vitoats
