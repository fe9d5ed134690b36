// AVX-512 with VNNI and VBMI2: 64 bytes are expanded by one instruction, and multiplied by one.
#pragma once

#include <immintrin.h>

#include "gelu_avx512.h"
#include "int8_kernels.h"

namespace vitoats {
namespace {

struct Int8Vector {
  static constexpr int lanes = 16;
  using T = __m512;
  static VITOATS_INLINE T zero() { return _mm512_setzero_ps(); }
  static VITOATS_INLINE T load(const float* p) { return _mm512_load_ps(p); }
  static VITOATS_INLINE T loadu(const float* p) { return _mm512_loadu_ps(p); }
  static VITOATS_INLINE void storeu(float* p, T v) { _mm512_storeu_ps(p, v); }
  static VITOATS_INLINE T loadu(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static VITOATS_INLINE void storeu(Float16* p, T v) {
    const T least = _mm512_min_ps(_mm512_set1_ps(kLargestFloat16), v);  // NaN stays NaN
    const __m256i half = _mm512_cvtps_ph(least, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  }
  static VITOATS_INLINE void storeu(BFloat16* p, T v) {
#if defined(__AVX512BF16__)
    const __m256i upper = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i safe = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(kNaN));
    const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32(safe, 16));
#endif
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), upper);
  }
  static VITOATS_INLINE T set1(float f) { return _mm512_set1_ps(f); }
  static VITOATS_INLINE T fmadd(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static VITOATS_INLINE T fnmadd(T a, T b, T c) { return _mm512_fnmadd_ps(a, b, c); }
  static VITOATS_INLINE T add(T a, T b) { return _mm512_add_ps(a, b); }
  static VITOATS_INLINE T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static VITOATS_INLINE T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static VITOATS_INLINE T min(T a, T b) { return _mm512_min_ps(a, b); }
  static VITOATS_INLINE T max(T a, T b) { return _mm512_max_ps(a, b); }
  static VITOATS_INLINE __m512i set1_int(int32_t n) { return _mm512_set1_epi32(n); }
  static VITOATS_INLINE float sum(T v) { return _mm512_reduce_add_ps(v); }
  static VITOATS_INLINE float reduce_min(T v) { return _mm512_reduce_min_ps(v); }
  static VITOATS_INLINE float reduce_max(T v) { return _mm512_reduce_max_ps(v); }
  static VITOATS_INLINE T from_int(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  static VITOATS_INLINE void store_bytes(uint8_t* p, T v, __m512i n) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(v), n)));
  }
};

template <>
VITOATS_INLINE __m512 gelu<Int8Vector>(__m512 x) {
  return gelu_avx512(x);
}

struct Vnni512 {
  using V = Int8Vector;
  using Weights = __m512i;
  using Sums = __m512i;
  struct Scope {
    Scope() {}
  };
  static constexpr int kTokens = 12;

  static VITOATS_INLINE Weights load(const int8_t* p) { return _mm512_loadu_si512(p); }
  static VITOATS_INLINE void store(int8_t* p, Weights w) { _mm512_storeu_si512(p, w); }
  static VITOATS_INLINE Weights expand(uint64_t mask, const int8_t* values) {
    return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
  }
  static VITOATS_INLINE Sums zero() { return _mm512_setzero_si512(); }
  static VITOATS_INLINE Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
  static VITOATS_INLINE Sums dot(Sums s, const uint8_t* x, Weights w) {
    int32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    return _mm512_dpbusd_epi32(s, _mm512_set1_epi32(bytes), w);
  }
  static VITOATS_INLINE void store_sums(int32_t* p, Sums s) { _mm512_storeu_si512(p, s); }
};

}  // namespace
}  // namespace vitoats
