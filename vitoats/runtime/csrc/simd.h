// Code shared by the kernels of all instruction sets: templates over a vector type V that each instruction set defines.
//
// V has: lanes; registers; T; zero(); load(p), loadu(p), store(p, v), storeu(p, v); set1(float); fmadd(a, b, c) = a b + c;
// add(a, b), sub(a, b), mul(a, b); max(a, b), which is b if b is NaN; sum(v), largest(v); round(v): to the nearest whole number;
// ldexp(v, n) = v 2^n for whole n <= 0: NaN if n is NaN, and zero may stand for a subnormal result; expand(packed, bits): moves
// the packed lanes, in order, to the lanes whose bits are set, zero elsewhere; widen(p): float16 lanes to float;
// transpose(source, source_stride, target, target_stride): transposes a square of lanes x lanes; Tail: half a vector, or NoTail;
// half(v): the first half of v.
//
// Everything here has internal linkage and uses no function template of the standard library: the linker keeps only one copy of
// those, possibly one with instructions that this processor lacks.
#pragma once

#include <cstdint>
#include <cstring>

#include "activations.h"
#include "float_weights.h"

#define VITOATS_INLINE inline __attribute__((always_inline))
#define VITOATS_NOINLINE __attribute__((noinline))

namespace vitoats {
namespace {

VITOATS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The tail of a tile that has no half vector at its end; its functions do nothing.
struct NoTail {
  struct T {};
  static constexpr int lanes = 0;
  static VITOATS_INLINE T zero() { return {}; }
  static VITOATS_INLINE T load(const float*) { return {}; }
  static VITOATS_INLINE void store(float*, T) {}
  template <class Weight>
  static VITOATS_INLINE T fmadd(Weight, T, T) { return {}; }
  static VITOATS_INLINE T add(T, T) { return {}; }
};

template <class V>
VITOATS_INLINE typename V::T load_vector(const float* p) {
  return V::loadu(p);
}

template <class V>
VITOATS_INLINE typename V::T load_vector(const uint16_t* p) {
  return V::widen(p);
}

// Loads a vector of values from p on, padded with zeros; reads nothing past the end.
template <class V>
VITOATS_INLINE typename V::T load_values(const float* p, const float* end) {
  if (end - p >= V::lanes) return load_vector<V>(p);
  alignas(64) float padded[V::lanes] = {};
  if (p < end) std::memcpy(padded, p, static_cast<size_t>(end - p) * sizeof(float));
  return V::load(padded);
}

template <class V>
VITOATS_INLINE typename V::T load_values(const uint16_t* p, const uint16_t* end) {
  if (end - p >= V::lanes) return load_vector<V>(p);
  alignas(64) uint16_t padded[V::lanes] = {};
  if (p < end) std::memcpy(padded, p, static_cast<size_t>(end - p) * sizeof(uint16_t));
  return V::widen(padded);
}

template <class V>
VITOATS_INLINE typename V::T load_values(const BFloat16* p, const BFloat16* end) {
  if (end - p >= V::lanes) return V::loadu(p);
  alignas(64) BFloat16 padded[V::lanes] = {};
  if (p < end) std::memcpy(padded, p, static_cast<size_t>(end - p) * sizeof(BFloat16));
  return V::loadu(padded);
}

// Stores the first n lanes, at most all.
template <class V>
VITOATS_INLINE void store_values(float* p, int64_t n, typename V::T v) {
  if (n >= V::lanes) return V::storeu(p, v);
  alignas(64) float padded[V::lanes];
  V::store(padded, v);
  std::memcpy(p, padded, static_cast<size_t>(n) * sizeof(float));
}

// target [n] += bias [n].
template <class V>
VITOATS_INLINE void add_bias(const float* bias, int64_t n, float* target) {
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::storeu(target + i, V::add(V::loadu(target + i), V::loadu(bias + i)));
  for (; i < n; ++i) target[i] += bias[i];
}

}  // namespace
}  // namespace vitoats
