// GELU, x (1 + erf(x / sqrt 2)) / 2, over a vector type.
//
// erf(x / sqrt 2) ~ x P(t) with t = 2 x^2 / 25 - 1 and x clamped to [-5, 5]: a polynomial of degree 12 whose greatest error in
// the result, |x P - erf| |x| / 2, was minimized (reweighted least squares). With float32 arithmetic, GELU is exact to 2e-6.
#pragma once

#include "simd.h"

namespace vitoats {
namespace {

constexpr float kErf[] = {0.282727561f,     -0.140593305f, 0.103042842f,    -0.0808658991f, 0.0628524589f, -0.0466734613f, 0.0329953133f,
                          -0.0219464651f,   0.0123308596f, -0.00583134446f, 0.00400372171f, -0.00302830829f, 0.000985938633f};

template <class V>
VITOATS_INLINE typename V::T gelu(typename V::T x) {
  const auto limit = V::set1(5.f);
  const auto clamped = V::max(V::min(x, limit), V::set1(-5.f));
  const auto t = V::fmadd(V::mul(clamped, clamped), V::set1(2.f / 25), V::set1(-1.f));
  auto sum = V::set1(kErf[12]);
#pragma GCC unroll 12
  for (int i = 11; i >= 0; --i) sum = V::fmadd(sum, t, V::set1(kErf[i]));
  const auto half = V::mul(x, V::set1(0.5f));
  return V::fmadd(half, V::mul(clamped, sum), half);
}

}  // namespace
}  // namespace vitoats
