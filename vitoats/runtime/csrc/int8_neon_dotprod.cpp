// NEON with dot products of signed bytes: x - 128 is multiplied, and 128 times the sums of the weights is added.
#include "int8_neon.h"

namespace vitoats {
namespace {

struct NeonDotprod : NeonEngine {
  static constexpr int kRegisterTokens = 6, kTokens = 4 * kRegisterTokens;  // they share the sums of the weights

  static VITOATS_INLINE Sums start(const int8_t* w, int64_t quads) {
    Sums s = zero();
    for (int64_t quad = 0; quad < quads; ++quad) s = multiply(s, vdupq_n_s8(1), load(w + quad * kQuadBytes));
    return times_128(s);
  }
  static VITOATS_INLINE Sums step(Sums s, const uint8_t* x, Weights w) {
    return multiply(s, vreinterpretq_s8_u8(veorq_u8(broadcast(x), vdupq_n_u8(128))), w);
  }
  static VITOATS_INLINE Sums dot(Sums s, const uint8_t* x, Weights w) {
    return step(add(s, times_128(multiply(zero(), vdupq_n_s8(1), w))), x, w);
  }

 private:
  static VITOATS_INLINE Sums multiply(Sums s, int8x16_t x, Weights w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) s.of[i] = vdotq_s32(s.of[i], w.of[i], x);
    return s;
  }
  static VITOATS_INLINE Sums times_128(Sums s) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) s.of[i] = vshlq_n_s32(s.of[i], 7);
    return s;
  }
};

template <>
struct BlockProduct<NeonDotprod> : OneStripProduct<NeonDotprod> {};

}  // namespace

extern const Int8Kernels kInt8NeonDotprod = int8_kernels<NeonDotprod>("neon_dotprod");

}  // namespace vitoats
