// What the int8 kernels for AVX2 and AVX-VNNI share: floats, and 64 bytes of weights in two vectors, expanded 8 bytes at a time.
#pragma once

#include <immintrin.h>

#include "expand_table.h"
#include "int8_one_strip.h"

namespace vitoats {
namespace {

struct Int8Vector {
  static constexpr int lanes = 8;
  using T = __m256;
  static VITOATS_INLINE T zero() { return _mm256_setzero_ps(); }
  static VITOATS_INLINE T load(const float* p) { return _mm256_load_ps(p); }
  static VITOATS_INLINE T loadu(const float* p) { return _mm256_loadu_ps(p); }
  static VITOATS_INLINE void storeu(float* p, T v) { _mm256_storeu_ps(p, v); }
  static VITOATS_INLINE T loadu(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static VITOATS_INLINE void storeu(Float16* p, T v) {
    const T least = _mm256_min_ps(_mm256_set1_ps(kLargestFloat16), v);  // NaN stays NaN
    const __m128i half = _mm256_cvtps_ph(least, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
  }
  static VITOATS_INLINE void storeu(BFloat16* p, T v) {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const T safe = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(_mm256_set1_epi32(kNaN)), _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(safe), 16);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
  }
  static VITOATS_INLINE T set1(float f) { return _mm256_set1_ps(f); }
  static VITOATS_INLINE T fmadd(T a, T b, T c) { return _mm256_fmadd_ps(a, b, c); }
  static VITOATS_INLINE T fnmadd(T a, T b, T c) { return _mm256_fnmadd_ps(a, b, c); }
  static VITOATS_INLINE T add(T a, T b) { return _mm256_add_ps(a, b); }
  static VITOATS_INLINE T sub(T a, T b) { return _mm256_sub_ps(a, b); }
  static VITOATS_INLINE T mul(T a, T b) { return _mm256_mul_ps(a, b); }
  static VITOATS_INLINE T min(T a, T b) { return _mm256_min_ps(a, b); }
  static VITOATS_INLINE T max(T a, T b) { return _mm256_max_ps(a, b); }
  static VITOATS_INLINE __m256i set1_int(int32_t n) { return _mm256_set1_epi32(n); }
  static VITOATS_INLINE float sum(T v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static VITOATS_INLINE float reduce_min(T v) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
  }
  static VITOATS_INLINE float reduce_max(T v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static VITOATS_INLINE T from_int(const int32_t* p) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static VITOATS_INLINE void store_bytes(uint8_t* p, T v, __m256i n) {
    const __m256i sums = _mm256_add_epi32(_mm256_cvtps_epi32(v), n);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
};

// An engine without its products: those need Sums dot(s, x, w).
struct Avx2Engine {
  using V = Int8Vector;
  struct Weights {
    __m256i low, high;  // 8 outputs each
  };
  struct Sums {
    __m256i low, high;
  };
  struct Scope {
    Scope() {}
  };

  static VITOATS_INLINE __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static VITOATS_INLINE Weights load(const int8_t* p) { return {load_bytes(p), load_bytes(p + 32)}; }
  static VITOATS_INLINE void store(int8_t* p, Weights w) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), w.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), w.high);
  }
  static VITOATS_INLINE Weights expand(uint64_t mask, const int8_t* values) {
    __m128i of_16[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m128i first = expand_8(mask >> 16 * i & 255, values);
      const __m128i second = expand_8(mask >> (16 * i + 8) & 255, values);
      of_16[i] = _mm_unpacklo_epi64(first, second);
    }
    return {_mm256_set_m128i(of_16[1], of_16[0]), _mm256_set_m128i(of_16[3], of_16[2])};
  }
  static VITOATS_INLINE Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static VITOATS_INLINE Sums start(const int8_t*, int64_t) { return zero(); }
  static VITOATS_INLINE Sums add(Sums a, Sums b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
  static VITOATS_INLINE void store_sums(int32_t* p, Sums s) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), s.low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), s.high);
  }

  static VITOATS_INLINE __m256i broadcast(const uint8_t* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    return _mm256_set1_epi32(bytes);
  }

 private:
  // The next 8 bytes of a strip. As many values as the mask has bits are taken.
  static VITOATS_INLINE __m128i expand_8(uint64_t mask, const int8_t*& values) {
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
    values += __builtin_popcountll(mask);
    return _mm_shuffle_epi8(packed, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.byte[mask])));
  }
};

}  // namespace
}  // namespace vitoats
