// NEON without dot products: the weights of each of the 4 inputs are gathered for all 16 outputs, widened to 16 bits, and
// multiplied by one number of x.
#include "int8_neon.h"

namespace vitoats {
namespace {

struct Neon : NeonEngine {
  static constexpr int kRegisterTokens = 4, kTokens = kRegisterTokens;

  static VITOATS_INLINE Sums dot(Sums s, const uint8_t* x, Weights w) {
    const int16x4_t numbers = vreinterpret_s16_u16(vget_low_u16(vmovl_u8(vget_low_u8(broadcast(x)))));
    const int8x16_t even_low = vuzp1q_s8(w.of[0], w.of[1]), even_high = vuzp1q_s8(w.of[2], w.of[3]);
    const int8x16_t odd_low = vuzp2q_s8(w.of[0], w.of[1]), odd_high = vuzp2q_s8(w.of[2], w.of[3]);
    s = multiply<0>(s, numbers, vuzp1q_s8(even_low, even_high));
    s = multiply<1>(s, numbers, vuzp1q_s8(odd_low, odd_high));
    s = multiply<2>(s, numbers, vuzp2q_s8(even_low, even_high));
    return multiply<3>(s, numbers, vuzp2q_s8(odd_low, odd_high));
  }
  static VITOATS_INLINE Sums step(Sums s, const uint8_t* x, Weights w) { return dot(s, x, w); }

 private:
  // The weights of 16 outputs for one input.
  template <int input>
  static VITOATS_INLINE Sums multiply(Sums s, int16x4_t numbers, int8x16_t weights) {
    const int16x8_t low = vmovl_s8(vget_low_s8(weights)), high = vmovl_high_s8(weights);
    return {{vmlal_lane_s16(s.of[0], vget_low_s16(low), numbers, input), vmlal_high_lane_s16(s.of[1], low, numbers, input),
             vmlal_lane_s16(s.of[2], vget_low_s16(high), numbers, input), vmlal_high_lane_s16(s.of[3], high, numbers, input)}};
  }
};

template <>
struct BlockProduct<Neon> : OneStripProduct<Neon> {};

}  // namespace

extern const Int8Kernels kInt8Neon = int8_kernels<Neon>("neon");

}  // namespace vitoats
