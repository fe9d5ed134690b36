// 2^x for vectors of floats.
#pragma once

#include "simd.h"

namespace vitoats {
namespace {

// Polynomials for 2^x on [-1/2, 1/2] with the smallest relative error: 7.5e-5 and 7.5e-8.
template <int degree>
struct Exp2;

template <>
struct Exp2<3> {
  static constexpr float coefficient[] = {0.9999280735f, 0.6932609855f, 0.2426111222f, 0.05517166906f};
};

template <>
struct Exp2<5> {
  static constexpr float coefficient[] = {1.000000072f,  0.6931469671f,  0.2402211972f,
                                          0.05550713273f, 0.009675541334f, 0.001327647199f};
};

// 2^x for x <= 0, also -infinity. Degree 5 is within 2 units in the last place; results below 2^-126 may be zero.
template <class V, int degree>
VITOATS_INLINE typename V::T exp2(typename V::T x) {
  x = V::max(V::set1(-160), x);  // NaN stays NaN
  const auto whole = V::round(x), rest = V::sub(x, whole);
  auto power = V::set1(Exp2<degree>::coefficient[degree]);
#pragma GCC unroll 8
  for (int i = degree - 1; i >= 0; --i) power = V::fmadd(power, rest, V::set1(Exp2<degree>::coefficient[i]));
  return V::ldexp(power, whole);
}

}  // namespace
}  // namespace vitoats
