// NEON on 64-bit ARM: 4 lanes, 32 registers.
#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace vitoats {
namespace {

// For each 4-bit mask, the packed byte that each byte takes; 255 gives zero.
struct ExpandTable {
  alignas(16) uint8_t byte[16][16];
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 16; ++bits)
    for (int i = 0, next = 0; i < 4; ++i) {
      const bool kept = bits >> i & 1;
      for (int b = 0; b < 4; ++b) table.byte[bits][4 * i + b] = static_cast<uint8_t>(kept ? 4 * next + b : 255);
      next += kept;
    }
  return table;
}

constexpr ExpandTable kExpand = make_expand_table();

struct Vector {
  static constexpr int lanes = 4;
  static constexpr int registers = 32;
  using T = float32x4_t;
  using Tail = NoTail;
  static VITOATS_INLINE T zero() { return vdupq_n_f32(0); }
  static VITOATS_INLINE T load(const float* p) { return vld1q_f32(p); }
  static VITOATS_INLINE T loadu(const float* p) { return vld1q_f32(p); }
  static VITOATS_INLINE void store(float* p, T v) { vst1q_f32(p, v); }
  static VITOATS_INLINE void storeu(float* p, T v) { vst1q_f32(p, v); }
  static VITOATS_INLINE T set1(float f) { return vdupq_n_f32(f); }
  static VITOATS_INLINE Tail::T half(T) { return {}; }
  static VITOATS_INLINE T fmadd(T a, T b, T c) { return vfmaq_f32(c, a, b); }
  static VITOATS_INLINE T add(T a, T b) { return vaddq_f32(a, b); }
  static VITOATS_INLINE T sub(T a, T b) { return vsubq_f32(a, b); }
  static VITOATS_INLINE T mul(T a, T b) { return vmulq_f32(a, b); }
  static VITOATS_INLINE T max(T a, T b) { return vmaxq_f32(a, b); }
  static VITOATS_INLINE float largest(T v) { return vmaxvq_f32(v); }
  static VITOATS_INLINE T round(T v) { return vrndnq_f32(v); }
  static VITOATS_INLINE T ldexp(T v, T n) {
    const int32x4_t bits = vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(vcvtq_s32_f32(n), 23));
    const uint32x4_t small = vcltq_f32(n, vdupq_n_f32(-126));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_s32(bits), small));
  }
  static VITOATS_INLINE float sum(T v) { return vaddvq_f32(v); }
  static VITOATS_INLINE T expand(T packed, uint32_t bits) {
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(packed), vld1q_u8(kExpand.byte[bits])));
  }
  static VITOATS_INLINE T widen(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

  static void transpose(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
    const float32x4_t a = loadu(source), b = loadu(source + source_stride);
    const float32x4_t c = loadu(source + 2 * source_stride), d = loadu(source + 3 * source_stride);
    const float32x4x2_t ab = vtrnq_f32(a, b), cd = vtrnq_f32(c, d);
    store(target, vcombine_f32(vget_low_f32(ab.val[0]), vget_low_f32(cd.val[0])));
    store(target + target_stride, vcombine_f32(vget_low_f32(ab.val[1]), vget_low_f32(cd.val[1])));
    store(target + 2 * target_stride, vcombine_f32(vget_high_f32(ab.val[0]), vget_high_f32(cd.val[0])));
    store(target + 3 * target_stride, vcombine_f32(vget_high_f32(ab.val[1]), vget_high_f32(cd.val[1])));
  }
};

}  // namespace
}  // namespace vitoats
