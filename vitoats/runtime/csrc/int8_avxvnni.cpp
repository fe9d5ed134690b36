// AVX-VNNI: 32 bytes are multiplied by one instruction.
#include "int8_avx2.h"

namespace vitoats {
namespace {

struct AvxVnni : Avx2Engine {
  static constexpr int kRegisterTokens = 6, kTokens = kRegisterTokens;

  static VITOATS_INLINE Sums dot(Sums s, const uint8_t* x, Weights w) {
    const __m256i bytes = broadcast(x);
    return {_mm256_dpbusd_avx_epi32(s.low, bytes, w.low), _mm256_dpbusd_avx_epi32(s.high, bytes, w.high)};
  }
  static VITOATS_INLINE Sums step(Sums s, const uint8_t* x, Weights w) { return dot(s, x, w); }
};

template <>
struct BlockProduct<AvxVnni> : OneStripProduct<AvxVnni> {};

}  // namespace

extern const Int8Kernels kInt8AvxVnni = int8_kernels<AvxVnni>("avx_vnni");

}  // namespace vitoats
