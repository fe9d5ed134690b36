// Quantizes rows of numbers, float or Float16, to uint8, over a vector type V (simd.h), whose loadu takes both types and storeu all
// types of activations, and which also has sub, mul, min, max, reduce_min, reduce_max, set1_int(n), and store_bytes(p, v, n): rounds
// each lane to the nearest integer, ties to even, adds the integer n, and stores the sum as a byte. The sum is at least 0; what is
// above 255 becomes 255.
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
template <class V, class Number>
VITOATS_INLINE typename V::T load_tail(const Number* v, int64_t n) {
  alignas(64) Number padded[V::lanes] = {};
  std::memcpy(padded, v, static_cast<size_t>(n) * sizeof(Number));
  return V::loadu(padded);
}

template <class V, class Number>
VITOATS_INLINE typename V::T load_up_to(const Number* v, int64_t n) {
  return n >= V::lanes ? V::loadu(v) : load_tail<V>(v, n);
}

// The smallest and largest of the numbers of a row, and 0, and a NaN if one is infinite or NaN, over several chains.
template <class V>
struct Range {
  using T = typename V::T;
  static constexpr int kChains = 4;
  T low[kChains], high[kChains], check[kChains];

  Range() {
    for (int c = 0; c < kChains; ++c) low[c] = high[c] = check[c] = V::zero();
  }

  VITOATS_INLINE void add(T x, int chain) {
    low[chain] = V::min(low[chain], x);
    high[chain] = V::max(high[chain], x);
    check[chain] = V::fmadd(x, V::zero(), check[chain]);
  }
};

template <class V, class Number>
Range<V> range_of(const Number* v, int64_t n) {
  Range<V> range;
  int64_t i = 0;
  for (; i + range.kChains * V::lanes <= n; i += range.kChains * V::lanes)
#pragma GCC unroll 4
    for (int c = 0; c < range.kChains; ++c) range.add(V::loadu(v + i + c * V::lanes), c);
  for (; i < n; i += V::lanes) range.add(load_up_to<V>(v + i, n - i), 0);
  return range;
}

template <class V, class Number>
void quantize_row(const Number* v, int64_t n, const Range<V>& range, const QuantizedRows& rows, int64_t row) {
  using T = typename V::T;
  T low = range.low[0], high = range.high[0], check = range.check[0];
  for (int c = 1; c < range.kChains; ++c) {
    low = V::min(low, range.low[c]);
    high = V::max(high, range.high[c]);
    check = V::add(check, range.check[c]);
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
  const T factor = V::set1(inverse);
  const auto shift = V::set1_int(static_cast<int32_t>(zero));
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::store_bytes(q + i, V::mul(V::loadu(v + i), factor), shift);
  if (i < n) {
    alignas(64) uint8_t bytes[V::lanes];
    V::store_bytes(bytes, V::mul(load_tail<V>(v + i, n - i), factor), shift);
    std::memcpy(q + i, bytes, static_cast<size_t>(n - i));
  }
  std::memset(q + n, 0, static_cast<size_t>(rows.stride - n));
}

// target = (x - mean(x)) / sqrt(variance(x) + epsilon) weight + bias; returns the target's range.
template <class V>
Range<V> normalize_row(const float* x, int64_t n, const LayerNorm& norm, float* target) {
  using T = typename V::T;
  constexpr int kChains = Range<V>::kChains;
  const int64_t whole = n / V::lanes * V::lanes, unrolled = n / (kChains * V::lanes) * (kChains * V::lanes);
  const auto over_whole = [&](const auto& body) {
    int64_t i = 0;
    for (; i < unrolled; i += kChains * V::lanes)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) body(i + c * V::lanes, c);
    for (; i < whole; i += V::lanes) body(i, 0);
  };
  const auto total = [](const T* t) { return V::sum(V::add(V::add(t[0], t[1]), V::add(t[2], t[3]))); };
  T sum[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()}, squares[kChains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  over_whole([&](int64_t i, int c) { sum[c] = V::add(sum[c], V::loadu(x + i)); });
  if (whole < n) sum[0] = V::add(sum[0], load_tail<V>(x + whole, n - whole));
  const float mean = total(sum) / static_cast<float>(n);
  const T shift = V::set1(mean);
  over_whole([&](int64_t i, int c) {
    const T centered = V::sub(V::loadu(x + i), shift);
    squares[c] = V::fmadd(centered, centered, squares[c]);
  });
  float variance = total(squares);
  for (int64_t i = whole; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
  const float inverse = 1 / __builtin_sqrtf(variance / static_cast<float>(n) + norm.epsilon);
  const T factor = V::set1(inverse);
  Range<V> range;
  over_whole([&](int64_t i, int c) {
    const T normalized = V::fmadd(V::mul(V::sub(V::loadu(x + i), shift), factor), V::loadu(norm.weight + i), V::loadu(norm.bias + i));
    V::storeu(target + i, normalized);
    range.add(normalized, c);
  });
  for (int64_t i = whole; i < n; ++i) target[i] = (x[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
  if (whole < n) range.add(load_tail<V>(target + whole, n - whole), 0);
  return range;
}

}  // namespace
}  // namespace vitoats
