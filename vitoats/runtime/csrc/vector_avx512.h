// AVX-512: 16 lanes, 32 registers, and an instruction that expands packed lanes according to a mask.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace vitoats {
namespace {

struct HalfVector {
  static constexpr int lanes = 8;
  using T = __m256;
  static VITOATS_INLINE T zero() { return _mm256_setzero_ps(); }
  static VITOATS_INLINE T load(const float* p) { return _mm256_load_ps(p); }
  static VITOATS_INLINE void store(float* p, T v) { _mm256_store_ps(p, v); }
  static VITOATS_INLINE T fmadd(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static VITOATS_INLINE T add(T a, T b) { return _mm256_add_ps(a, b); }
};

struct Vector {
  static constexpr int lanes = 16;
  static constexpr int registers = 32;
  using T = __m512;
  using Tail = HalfVector;
  static VITOATS_INLINE T zero() { return _mm512_setzero_ps(); }
  static VITOATS_INLINE T load(const float* p) { return _mm512_load_ps(p); }
  static VITOATS_INLINE T loadu(const float* p) { return _mm512_loadu_ps(p); }
  static VITOATS_INLINE T loadu(const BFloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static VITOATS_INLINE void store(float* p, T v) { _mm512_store_ps(p, v); }
  static VITOATS_INLINE void storeu(float* p, T v) { _mm512_storeu_ps(p, v); }
  static VITOATS_INLINE T set1(float f) { return _mm512_set1_ps(f); }
  static VITOATS_INLINE Tail::T half(T v) { return _mm512_castps512_ps256(v); }
  static VITOATS_INLINE T fmadd(T a, T b, T c) { return _mm512_fmadd_ps(a, b, c); }
  static VITOATS_INLINE T add(T a, T b) { return _mm512_add_ps(a, b); }
  static VITOATS_INLINE T sub(T a, T b) { return _mm512_sub_ps(a, b); }
  static VITOATS_INLINE T mul(T a, T b) { return _mm512_mul_ps(a, b); }
  static VITOATS_INLINE T max(T a, T b) { return _mm512_max_ps(a, b); }
  static VITOATS_INLINE float largest(T v) { return _mm512_reduce_max_ps(v); }
  static VITOATS_INLINE T round(T v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static VITOATS_INLINE T ldexp(T v, T n) { return _mm512_scalef_ps(v, n); }
  static VITOATS_INLINE float sum(T v) { return _mm512_reduce_add_ps(v); }
  static VITOATS_INLINE T expand(T packed, uint32_t bits) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), packed);
  }
  static VITOATS_INLINE T widen(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static VITOATS_INLINE T unpack_low(T a, T b) {  // pairs of lanes
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static VITOATS_INLINE T unpack_high(T a, T b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }

  // Transposes 4 x 4 blocks within the 128-bit lanes, then the lanes.
  static void transpose(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
    T a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = loadu(source + i * source_stride);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = unpack_low(b[i], b[i + 2]);
      a[i + 1] = unpack_high(b[i], b[i + 2]);
      a[i + 2] = unpack_low(b[i + 1], b[i + 3]);
      a[i + 3] = unpack_high(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
      b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
      b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
      b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_ps(target + i * target_stride, _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88));
      _mm512_storeu_ps(target + (i + 4) * target_stride, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88));
      _mm512_storeu_ps(target + (i + 8) * target_stride, _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd));
      _mm512_storeu_ps(target + (i + 12) * target_stride, _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd));
    }
  }
};

}  // namespace
}  // namespace vitoats
