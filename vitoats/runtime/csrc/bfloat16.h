// Pairs of bfloat16 in vectors of AVX-512, rounded to nearest even. Without AVX512-BF16 they are made by integer instructions: so
// the kernels for AMX, whose tiles can be emulated, are tested on processors that have neither.
#pragma once

#include "vector_avx512.h"

namespace vitoats {
namespace {
namespace bfloat16 {

#if defined(__AVX512BF16__)

// [first, second]
VITOATS_INLINE __m512 pack(__m512 first, __m512 second) { return reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(second, first)); }

// Lane i is the pair of lanes i.
VITOATS_INLINE __m512 interleave(__m512 first, __m512 second) {
  const __m512i lanes = _mm512_set_epi32(31 << 16 | 15, 30 << 16 | 14, 29 << 16 | 13, 28 << 16 | 12, 27 << 16 | 11, 26 << 16 | 10,
                                         25 << 16 | 9, 24 << 16 | 8, 23 << 16 | 7, 22 << 16 | 6, 21 << 16 | 5, 20 << 16 | 4,
                                         19 << 16 | 3, 18 << 16 | 2, 17 << 16 | 1, 16 << 16 | 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(lanes, _mm512_castps_si512(pack(first, second))));
}

#else

// Rounds to the upper 16 bits of each lane; an infinity may come of a NaN.
VITOATS_INLINE __m512i rounded(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

VITOATS_INLINE __m512 pack(__m512 first, __m512 second) {
  const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(first), 16));
  const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(second), 16));
  return _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

VITOATS_INLINE __m512 interleave(__m512 first, __m512 second) {
  const __m512i high = _mm512_and_si512(rounded(second), _mm512_set1_epi32(-0x10000));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(rounded(first), 16), high));
}

#endif

}  // namespace bfloat16
}  // namespace
}  // namespace vitoats
