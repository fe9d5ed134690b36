// The types of activations in memory: float32 between nodes, and bfloat16 inside a node that computes more than one product.
#pragma once

#include <cstdint>

namespace vitoats {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

constexpr uint32_t kNaN = 0x7fc00000;  // what every NaN becomes, since rounding could carry it over to another number

// An array of activations in one of the types; the other pointer is null.
struct Activations {
  const float* float32 = nullptr;
  const BFloat16* bfloat16 = nullptr;

  Activations(const float* p) : float32(p) {}
  Activations(const BFloat16* p) : bfloat16(p) {}

  // From the n-th number on.
  Activations from(int64_t n) const { return float32 ? Activations(float32 + n) : Activations(bfloat16 + n); }
};

}  // namespace vitoats
