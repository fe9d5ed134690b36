// What the int8 kernels for NEON share: floats, and 64 bytes of weights in four vectors, expanded 8 bytes at a time.
#pragma once

#include <arm_neon.h>

#include "expand_table.h"
#include "int8_one_strip.h"

namespace vitoats {
namespace {

struct Int8Vector {
  static constexpr int lanes = 4;
  using T = float32x4_t;
  static VITOATS_INLINE T zero() { return vdupq_n_f32(0); }
  static VITOATS_INLINE T load(const float* p) { return vld1q_f32(p); }
  static VITOATS_INLINE T loadu(const float* p) { return vld1q_f32(p); }
  static VITOATS_INLINE void storeu(float* p, T v) { vst1q_f32(p, v); }
  static VITOATS_INLINE T loadu(const Float16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  static VITOATS_INLINE void storeu(Float16* p, T v) {
    vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(vminq_f32(vdupq_n_f32(kLargestFloat16), v))));
  }
  static VITOATS_INLINE void storeu(BFloat16* p, T v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t safe = vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(kNaN));
    vst1_u16(&p->bits, vshrn_n_u32(safe, 16));
  }
  static VITOATS_INLINE T set1(float f) { return vdupq_n_f32(f); }
  static VITOATS_INLINE T fmadd(T a, T b, T c) { return vfmaq_f32(c, a, b); }
  static VITOATS_INLINE T fnmadd(T a, T b, T c) { return vfmsq_f32(c, a, b); }
  static VITOATS_INLINE T add(T a, T b) { return vaddq_f32(a, b); }
  static VITOATS_INLINE T sub(T a, T b) { return vsubq_f32(a, b); }
  static VITOATS_INLINE T mul(T a, T b) { return vmulq_f32(a, b); }
  static VITOATS_INLINE T min(T a, T b) { return vminq_f32(a, b); }
  static VITOATS_INLINE T max(T a, T b) { return vmaxq_f32(a, b); }
  static VITOATS_INLINE int32x4_t set1_int(int32_t n) { return vdupq_n_s32(n); }
  static VITOATS_INLINE float sum(T v) { return vaddvq_f32(v); }
  static VITOATS_INLINE float reduce_min(T v) { return vminvq_f32(v); }
  static VITOATS_INLINE float reduce_max(T v) { return vmaxvq_f32(v); }
  static VITOATS_INLINE T from_int(const int32_t* p) { return vcvtq_f32_s32(vld1q_s32(p)); }
  static VITOATS_INLINE void store_bytes(uint8_t* p, T v, int32x4_t n) {
    const uint16x4_t words = vqmovun_s32(vaddq_s32(vcvtnq_s32_f32(v), n));
    const uint32x2_t bytes = vreinterpret_u32_u8(vqmovn_u16(vcombine_u16(words, words)));
    const uint32_t four = vget_lane_u32(bytes, 0);
    std::memcpy(p, &four, sizeof four);
  }
};

// An engine without its products.
struct NeonEngine {
  using V = Int8Vector;
  struct Weights {
    int8x16_t of[4];  // 4 outputs each
  };
  struct Sums {
    int32x4_t of[4];
  };
  struct Scope {
    Scope() {}
  };

  static VITOATS_INLINE Weights load(const int8_t* p) { return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}}; }
  static VITOATS_INLINE void store(int8_t* p, Weights w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) vst1q_s8(p + 16 * i, w.of[i]);
  }
  static VITOATS_INLINE Weights expand(uint64_t mask, const int8_t* values) {
    Weights w;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int8x8_t first = expand_8(mask >> 16 * i & 255, values);
      const int8x8_t second = expand_8(mask >> (16 * i + 8) & 255, values);
      w.of[i] = vcombine_s8(first, second);
    }
    return w;
  }
  static VITOATS_INLINE Sums zero() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static VITOATS_INLINE Sums start(const int8_t*, int64_t) { return zero(); }
  static VITOATS_INLINE Sums add(Sums a, Sums b) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) a.of[i] = vaddq_s32(a.of[i], b.of[i]);
    return a;
  }
  static VITOATS_INLINE void store_sums(int32_t* p, Sums s) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, s.of[i]);
  }

  // The 4 bytes at x, in all lanes.
  static VITOATS_INLINE uint8x16_t broadcast(const uint8_t* x) {
    uint32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    return vreinterpretq_u8_u32(vdupq_n_u32(bytes));
  }

 private:
  // The next 8 bytes of a strip. As many values as the mask has bits are taken.
  static VITOATS_INLINE int8x8_t expand_8(uint64_t mask, const int8_t*& values) {
    const int8x8_t packed = vld1_s8(values);
    values += __builtin_popcountll(mask);
    return vtbl1_s8(packed, vreinterpret_s8_u8(vld1_u8(kExpand.byte[mask])));
  }
};

}  // namespace
}  // namespace vitoats
