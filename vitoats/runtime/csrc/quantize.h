// Quantizes rows of numbers to uint8, over a vector type V (simd.h), which also has sub, mul, min, max, reduce_min, reduce_max,
// set1_int(n), and store_bytes(p, v, n): rounds each lane to the nearest integer, ties to even, adds the integer n, and stores the
// sum as a byte. The sum is at least 0; what is above 255 becomes 255.
//
//   low = min(0, min v), high = max(0, max v), scale = high / 255 - low / 255
//   zero = round(-low / scale), q = min(round(v / scale) + zero, 255)
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
  constexpr int chains = 4;
  T low[chains], high[chains], check[chains];
  const T none = V::zero();
  for (int c = 0; c < chains; ++c) low[c] = high[c] = check[c] = none;
  const auto look = [&](T x, int c) {
    low[c] = V::min(low[c], x);
    high[c] = V::max(high[c], x);
    check[c] = V::fmadd(x, none, check[c]);  // NaN if x is infinite or NaN
  };
  int64_t i = 0;
  for (; i + chains * V::lanes <= n; i += chains * V::lanes)
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) look(V::loadu(v + i + c * V::lanes), c);
  for (; i < n; i += V::lanes) look(load_up_to<V>(v + i, n - i), 0);
  for (int c = 1; c < chains; ++c) {
    low[0] = V::min(low[0], low[c]);
    high[0] = V::max(high[0], high[c]);
    check[0] = V::add(check[0], check[c]);
  }
  uint8_t* q = rows.q + row * rows.stride;
  const float least = V::reduce_min(low[0]), most = V::reduce_max(high[0]), finite = V::sum(check[0]);
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
  const T factor = V::set1(inverse);
  const auto shift = V::set1_int(static_cast<int32_t>(zero));
  for (i = 0; i + V::lanes <= n; i += V::lanes) V::store_bytes(q + i, V::mul(V::loadu(v + i), factor), shift);
  if (i < n) {
    alignas(64) uint8_t bytes[V::lanes];
    V::store_bytes(bytes, V::mul(load_tail<V>(v + i, n - i), factor), shift);
    std::memcpy(q + i, bytes, static_cast<size_t>(n - i));
  }
  std::memset(q + n, 0, static_cast<size_t>(rows.stride - n));
}

// target = (x - mean(x)) / sqrt(variance(x) + epsilon) weight + bias
template <class V>
void normalize_row(const float* x, int64_t n, const LayerNorm& norm, float* target) {
  using T = typename V::T;
  const int64_t whole = n / V::lanes * V::lanes;
  T sum[2] = {V::zero(), V::zero()}, squares[2] = {V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 2 * V::lanes <= n; i += 2 * V::lanes)
    for (int c = 0; c < 2; ++c) sum[c] = V::add(sum[c], V::loadu(x + i + c * V::lanes));
  for (; i < n; i += V::lanes) sum[0] = V::add(sum[0], load_up_to<V>(x + i, n - i));
  const float mean = V::sum(V::add(sum[0], sum[1])) / static_cast<float>(n);
  const T shift = V::set1(mean);
  const auto square = [&](int64_t at, int c) {
    const T centered = V::sub(V::loadu(x + at), shift);
    squares[c] = V::fmadd(centered, centered, squares[c]);
  };
  for (i = 0; i + 2 * V::lanes <= n; i += 2 * V::lanes)
    for (int c = 0; c < 2; ++c) square(i + c * V::lanes, c);
  if (i < whole) square(i, 0);
  float variance = V::sum(V::add(squares[0], squares[1]));
  for (i = whole; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1 / __builtin_sqrtf(variance / static_cast<float>(n) + norm.epsilon);
  const T factor = V::set1(inverse);
  for (i = 0; i < whole; i += V::lanes)
    V::storeu(target + i, V::fmadd(V::mul(V::sub(V::loadu(x + i), shift), factor), V::loadu(norm.weight + i), V::loadu(norm.bias + i)));
  for (; i < n; ++i) target[i] = (x[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
}

}  // namespace
}  // namespace vitoats
