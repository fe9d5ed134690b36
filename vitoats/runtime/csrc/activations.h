// The types of activations in memory: float32 between nodes, and two shorter ones inside a node that does more than one product.
// float16 is exact enough for what is quantized next; bfloat16 is what attention multiplies anyway.
#pragma once

#include <cstdint>

namespace vitoats {

struct Float16 {
  uint16_t bits;
};

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

constexpr float kLargestFloat16 = 65504;
constexpr uint32_t kNaN = 0x7fc00000;  // the bits of NaN; rounded as a number, another NaN could become an infinity or zero

// An array of activations in one of the types; the other pointers are null.
struct Activations {
  const float* float32 = nullptr;
  const Float16* float16 = nullptr;
  const BFloat16* bfloat16 = nullptr;

  Activations(const float* p) : float32(p) {}
  Activations(const Float16* p) : float16(p) {}
  Activations(const BFloat16* p) : bfloat16(p) {}

  // From the n-th number on.
  Activations from(int64_t n) const {
    if (float32) return float32 + n;
    if (float16) return float16 + n;
    return bfloat16 + n;
  }
};

}  // namespace vitoats
