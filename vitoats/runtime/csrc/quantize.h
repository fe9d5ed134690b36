// Quantizes rows of numbers to uint8, over a vector type V (simd.h), which also has sub, mul, min, max, and store_bytes(p, v):
// rounds to the nearest integer, ties to even, and stores each lane, which is in [0, 255], as a byte.
//
//   low = min(0, min v), high = max(0, max v), scale = high / 255 - low / 255
//   zero = round(-low / scale), q = clamp(round(v / scale) + zero, 0, 255)
//
// A row of zeros has scale 0. A row with an infinity or NaN has a NaN as its scale.
#pragma once

#include "int8.h"
#include "simd.h"

namespace vitoats {
namespace {

// Up to 16 numbers as a vector, padded with zeros.
template <class V>
VITOATS_INLINE typename V::T load_tail(const float* v, int64_t n) {
  alignas(64) float padded[V::lanes] = {};
  std::memcpy(padded, v, static_cast<size_t>(n) * sizeof(float));
  return V::load(padded);
}

template <class V>
VITOATS_INLINE typename V::T load_up_to(const float* v, int64_t n) {
  return n >= V::lanes ? V::loadu(v) : load_tail<V>(v, n);
}

template <class V>
void quantize_row(const float* v, int64_t n, const QuantizedRows& rows, int64_t row) {
  using T = typename V::T;
  T low = V::zero(), high = V::zero(), check = V::zero();
  const T none = V::zero();
  for (int64_t i = 0; i < n; i += V::lanes) {
    const T x = load_up_to<V>(v + i, n - i);
    low = V::min(low, x);
    high = V::max(high, x);
    check = V::fmadd(x, none, check);  // NaN if x is infinite or NaN
  }
  uint8_t* q = rows.q + row * rows.stride;
  const float least = V::reduce_min(low), most = V::reduce_max(high), finite = V::sum(check);
  float scale = most * (1.f / 255) - least * (1.f / 255);
  if (!(finite == 0) || !(scale > 0)) {
    rows.scale[row] = finite == 0 ? 0 : finite;
    rows.zero[row] = 0;
    std::memset(q, 0, static_cast<size_t>(rows.stride));
    return;
  }
  const float inverse = 1 / scale, zero = __builtin_nearbyintf(-least * inverse);
  rows.scale[row] = scale;
  rows.zero[row] = zero;
  const T factor = V::set1(inverse), shift = V::set1(zero), top = V::set1(255.f);
  int64_t i = 0;
  const auto quantized = [&](T x) { return V::min(V::max(V::add(V::round(V::mul(x, factor)), shift), none), top); };
  for (; i + V::lanes <= n; i += V::lanes) V::store_bytes(q + i, quantized(V::loadu(v + i)));
  if (i < n) {
    alignas(64) uint8_t bytes[V::lanes];
    V::store_bytes(bytes, quantized(load_tail<V>(v + i, n - i)));
    std::memcpy(q + i, bytes, static_cast<size_t>(n - i));
  }
  std::memset(q + n, 0, static_cast<size_t>(rows.stride - n));
}

// target = (x - mean(x)) / sqrt(variance(x) + epsilon) weight + bias
template <class V>
void normalize_row(const float* x, int64_t n, const LayerNorm& norm, float* target) {
  using T = typename V::T;
  const int64_t whole = n / V::lanes * V::lanes;
  T sum = V::zero();
  for (int64_t i = 0; i < n; i += V::lanes) sum = V::add(sum, load_up_to<V>(x + i, n - i));
  const float mean = V::sum(sum) / static_cast<float>(n);
  const T shift = V::set1(mean);
  T squares = V::zero();
  for (int64_t i = 0; i < whole; i += V::lanes) {
    const T centered = V::sub(V::loadu(x + i), shift);
    squares = V::fmadd(centered, centered, squares);
  }
  float variance = V::sum(squares);
  for (int64_t i = whole; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1 / __builtin_sqrtf(variance / static_cast<float>(n) + norm.epsilon);
  const T factor = V::set1(inverse);
  for (int64_t i = 0; i < whole; i += V::lanes)
    V::storeu(target + i, V::fmadd(V::mul(V::sub(V::loadu(x + i), shift), factor), V::loadu(norm.weight + i), V::loadu(norm.bias + i)));
  for (int64_t i = whole; i < n; ++i) target[i] = (x[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
}

}  // namespace
}  // namespace vitoats
