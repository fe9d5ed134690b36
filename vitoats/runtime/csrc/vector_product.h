// Products of steps by vector instructions: sums in registers for a few rows and up to kPanel vectors of columns.
#pragma once

#include "attend.h"

namespace vitoats {
namespace {
namespace attention {

// Rows whose sums fit into registers together with the operands.
template <class V, int C>
constexpr int rows_in_registers() {
  return (V::registers >= 32 ? C == 4 : C == 2) ? 6 : 8;
}

// c [R, C vectors] = a [R, steps] b [steps, C vectors]
template <class A, int R, int C>
VITOATS_INLINE void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t steps, float* c, int64_t c_stride) {
  using V = typename A::V;
  typename V::T sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sum[r][j] = V::zero();
  for (int64_t s = 0; s < steps; ++s, b += C * V::lanes) {
    typename V::T row[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) row[j] = V::load(b + j * V::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto step = V::set1(a[r * a_stride + s]);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) sum[r][j] = A::multiply_add(step, row[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) V::store(c + r * c_stride + j * V::lanes, sum[r][j]);
}

template <class A, int C>
void multiply_panel(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t steps, float* c, int64_t c_stride) {
  constexpr int R = rows_in_registers<typename A::V, C>();
  static_assert(A::kQueries % R == 0, "the last rows of a block may be padding");
  for (int64_t r = 0; r < rows; r += R) multiply_rows<A, R, C>(a + r * a_stride, a_stride, b, steps, c + r * c_stride, c_stride);
}

// The part of an arithmetic that does products by A::multiply_add(step, vector, sum).
template <class A, class V>
struct VectorProduct {
  static constexpr int kStepGroup = 1, kQueries = 24;
  struct Context {};

  static VITOATS_INLINE void multiply(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t vectors, int64_t steps,
                                      float* c, int64_t c_stride) {
    constexpr int P = kPanel<V>;
    for (; vectors >= P; vectors -= P, b += P * V::lanes * steps, c += P * V::lanes)
      multiply_panel<A, P>(a, a_stride, rows, b, steps, c, c_stride);
    if (P > 3 && vectors == 3) multiply_panel<A, 3>(a, a_stride, rows, b, steps, c, c_stride);
    if (P > 2 && vectors == 2) multiply_panel<A, 2>(a, a_stride, rows, b, steps, c, c_stride);
    if (vectors == 1) multiply_panel<A, 1>(a, a_stride, rows, b, steps, c, c_stride);
  }
};

template <class Vector>
struct Float32 : VectorProduct<Float32<Vector>, Vector> {
  using V = Vector;
  using T = typename V::T;
  static constexpr int kSteps = 1, kDegree = 5;
  static VITOATS_INLINE T pack(T first, T) { return first; }
  static VITOATS_INLINE T interleave(T first, T) { return first; }
  static VITOATS_INLINE T multiply_add(T step, T vector, T sum) { return V::fmadd(step, vector, sum); }
};

}  // namespace attention
}  // namespace
}  // namespace vitoats
