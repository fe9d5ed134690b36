// Plain C++: 4 lanes that the compiler may map to any vector instructions.
#pragma once

#include "half.h"
#include "simd.h"

namespace vitoats {
namespace {

struct Vector {
  static constexpr int lanes = 4;
  static constexpr int registers = 16;
  struct T {
    float lane[lanes];
  };
  using Tail = NoTail;
  static VITOATS_INLINE T zero() { return {}; }
  static VITOATS_INLINE T load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static VITOATS_INLINE T loadu(const float* p) { return load(p); }
  static VITOATS_INLINE void store(float* p, T v) { std::memcpy(p, v.lane, sizeof v.lane); }
  static VITOATS_INLINE void storeu(float* p, T v) { store(p, v); }
  static VITOATS_INLINE T set1(float f) { return {{f, f, f, f}}; }
  static VITOATS_INLINE Tail::T half(T) { return {}; }
  static VITOATS_INLINE T fmadd(T a, T b, T c) {
    for (int i = 0; i < lanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static VITOATS_INLINE T add(T a, T b) {
    for (int i = 0; i < lanes; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static VITOATS_INLINE T sub(T a, T b) {
    for (int i = 0; i < lanes; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static VITOATS_INLINE T mul(T a, T b) {
    for (int i = 0; i < lanes; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static VITOATS_INLINE T max(T a, T b) {
    for (int i = 0; i < lanes; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  static VITOATS_INLINE float largest(T v) {
    float m = v.lane[0];
    for (int i = 1; i < lanes; ++i) m = m > v.lane[i] ? m : v.lane[i];
    return m;
  }
  static VITOATS_INLINE T round(T v) {
    constexpr float magic = 0x1.8p23f;  // floats above it are whole numbers
    for (int i = 0; i < lanes; ++i) v.lane[i] = (v.lane[i] + magic) - magic;
    return v;
  }
  static VITOATS_INLINE float ldexp1(float v, float n) {
    if (!(n >= -126)) return n < -126 ? 0 : n;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return v * power;
  }
  static VITOATS_INLINE T ldexp(T v, T n) {
    for (int i = 0; i < lanes; ++i) v.lane[i] = ldexp1(v.lane[i], n.lane[i]);
    return v;
  }
  static VITOATS_INLINE float sum(T v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }
  static VITOATS_INLINE T expand(T packed, uint32_t bits) {
    T v{};
    for (int i = 0, next = 0; i < lanes; ++i)
      if (bits >> i & 1) v.lane[i] = packed.lane[next++];
    return v;
  }

  // IEEE 754 half to single precision, without arithmetic on subnormal floats: they may be treated as zero.
  static VITOATS_INLINE T widen(const uint16_t* p) {
    T found;
    for (int i = 0; i < lanes; ++i) found.lane[i] = from_float16({p[i]});
    return found;
  }

  static void transpose(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
    for (int i = 0; i < lanes; ++i)
      for (int j = 0; j < lanes; ++j) target[i * target_stride + j] = source[j * source_stride + i];
  }
};

}  // namespace
}  // namespace vitoats
