// AVX2: vpmaddubsw would multiply 32 bytes at once, but its sums of two products saturate at 16 bits. So the bytes with an even
// and those with an odd index are widened to 16 bits where they are, and multiplied apart: all products of an output end up in
// the same lane.
#include "int8_avx2.h"

namespace vitoats {
namespace {

struct Avx2 : Avx2Engine {
  static constexpr int kRegisterTokens = 4, kTokens = kRegisterTokens;

  static VITOATS_INLINE Sums dot(Sums s, const uint8_t* x, Weights w) {
    const __m256i bytes = broadcast(x), even = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(bytes, 8);
    return {dot_8(s.low, even, odd, w.low), dot_8(s.high, even, odd, w.high)};
  }
  static VITOATS_INLINE Sums step(Sums s, const uint8_t* x, Weights w) { return dot(s, x, w); }

 private:
  static VITOATS_INLINE __m256i dot_8(__m256i sums, __m256i even, __m256i odd, __m256i w) {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8)));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(odd, _mm256_srai_epi16(w, 8)));
  }
};

template <>
struct BlockProduct<Avx2> : OneStripProduct<Avx2> {};

}  // namespace

extern const Int8Kernels kInt8Avx2 = int8_kernels<Avx2>("avx2");

}  // namespace vitoats
