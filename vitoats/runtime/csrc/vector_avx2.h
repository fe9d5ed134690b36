// AVX2 with FMA and F16C: 8 lanes, 16 registers.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace vitoats {
namespace {

// For each 8-bit mask, the packed lane that each lane takes.
struct ExpandTable {
  alignas(8) uint8_t lane[256][8];
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 256; ++bits)
    for (int i = 0, next = 0; i < 8; ++i) table.lane[bits][i] = static_cast<uint8_t>(bits >> i & 1 ? next++ : 0);
  return table;
}

constexpr ExpandTable kExpand = make_expand_table();

struct HalfVector {
  static constexpr int lanes = 4;
  using T = __m128;
  static VITOATS_INLINE T zero() { return _mm_setzero_ps(); }
  static VITOATS_INLINE T load(const float* p) { return _mm_load_ps(p); }
  static VITOATS_INLINE void store(float* p, T v) { _mm_store_ps(p, v); }
  static VITOATS_INLINE T fmadd(T a, T b, T c) { return _mm_fmadd_ps(a, b, c); }
  static VITOATS_INLINE T add(T a, T b) { return _mm_add_ps(a, b); }
};

struct Vector {
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  using T = __m256;
  using Tail = HalfVector;
  static VITOATS_INLINE T zero() { return _mm256_setzero_ps(); }
  static VITOATS_INLINE T load(const float* p) { return _mm256_load_ps(p); }
  static VITOATS_INLINE T loadu(const float* p) { return _mm256_loadu_ps(p); }
  static VITOATS_INLINE void store(float* p, T v) { _mm256_store_ps(p, v); }
  static VITOATS_INLINE void storeu(float* p, T v) { _mm256_storeu_ps(p, v); }
  static VITOATS_INLINE T set1(float f) { return _mm256_set1_ps(f); }
  static VITOATS_INLINE Tail::T half(T v) { return _mm256_castps256_ps128(v); }
  static VITOATS_INLINE T fmadd(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static VITOATS_INLINE T add(T a, T b) { return _mm256_add_ps(a, b); }
  static VITOATS_INLINE T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  static VITOATS_INLINE T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static VITOATS_INLINE T max(T a, T b) { return _mm256_max_ps(a, b); }
  static VITOATS_INLINE float largest(T v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static VITOATS_INLINE T round(T v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static VITOATS_INLINE T ldexp(T v, T n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const T normal = _mm256_cmp_ps(n, _mm256_set1_ps(-126), _CMP_NLT_UQ);
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponent)), normal);
  }
  static VITOATS_INLINE float sum(T v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static VITOATS_INLINE T expand(T packed, uint32_t bits) {
    const __m128i lanes_of = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.lane[bits]));
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit);
    return _mm256_and_ps(_mm256_permutevar8x32_ps(packed, _mm256_cvtepu8_epi32(lanes_of)), _mm256_castsi256_ps(kept));
  }
  static VITOATS_INLINE T widen(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static void transpose(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
    T a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = loadu(source + i * source_stride);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(target + i * target_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      _mm256_storeu_ps(target + (i + 4) * target_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }
};

}  // namespace
}  // namespace vitoats
