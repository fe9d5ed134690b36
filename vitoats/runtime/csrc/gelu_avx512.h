// GELU from a table, for AVX-512: half as many multiplications as the polynomial of gelu.h. While AMX is busy, only one of the two
// units for vectors of 512 bits does arithmetic, but the other one still permutes.
//
// GELU(x) = x / 2 + h(|x|) with h(a) = a erf(a / sqrt 2) / 2. Around each multiple of kGeluStep, h is a polynomial of degree 3 with
// the smallest greatest error; the last one is a / 2, from there on. With float32 arithmetic, GELU is exact to 7e-7, and small
// results have a relative error below 2e-5.
#pragma once

#include <immintrin.h>

#include "gelu.h"

namespace vitoats {
namespace {

constexpr int kGeluPieces = 32;
constexpr float kGeluStep = 0.17f;

// [power of a, piece]
alignas(64) constexpr float kGelu[4][kGeluPieces] = {
    {0, 4.00990029e-05f, 0.000692631467f, 0.00282879127f, 0.00594259519f, 0.00660587521f, -0.00174186996f, -0.0271608438f,
     -0.0762133896f, -0.150825769f, -0.246406168f, -0.352100044f, -0.453170598f, -0.534647942f, -0.584966302f, -0.598442733f,
     -0.575917184f, -0.52382797f, -0.451953351f, -0.370984584f, -0.290418386f, -0.217254907f, -0.155569732f, -0.106785834f,
     -0.070350945f, -0.0445304066f, -0.0271067265f, -0.0158812646f, -0.00896175392f, -0.00487391558f, -0.00255615544f, 0},
    {-7.46522755e-06f, -0.00109456491f, -0.00858160947f, -0.0236661285f, -0.0395878777f, -0.0425846316f, -0.0162785985f, 0.0522805601f,
     0.167370468f, 0.322131097f, 0.499732167f, 0.677586555f, 0.833005369f, 0.948392093f, 1.01450324f, 1.03117383f,
     1.00571132f, 0.950100362f, 0.877651334f, 0.800396085f, 0.727438033f, 0.664398432f, 0.61371088f, 0.575400233f,
     0.548001707f, 0.529375732f, 0.517298818f, 0.509811163f, 0.505363286f, 0.502827644f, 0.501438677f, 0.5f},
    {0.399475634f, 0.409597307f, 0.4387528f, 0.474497706f, 0.50172317f, 0.50616771f, 0.478507131f, 0.416811347f,
     0.326735824f, 0.219673395f, 0.10962069f, 0.00982279517f, -0.0698658153f, -0.124349467f, -0.153309003f, -0.160182551f,
     -0.150587365f, -0.130794197f, -0.106448211f, -0.0818745643f, -0.059849374f, -0.0417420715f, -0.0278572794f, -0.0178278591f,
     -0.0109595731f, -0.00648055645f, -0.00369008421f, -0.00202518306f, -0.00107209047f, -0.000547800912f, -0.0002703231f, 0},
    {-0.010835778f, -0.0441362485f, -0.08268857f, -0.11110983f, -0.126676276f, -0.128847256f, -0.119141996f, -0.100618035f,
     -0.0771015733f, -0.0523990579f, -0.0296567902f, -0.0109835584f, 0.00264036306f, 0.0112179806f, 0.0154473539f, 0.0163920037f,
     0.0151865911f, 0.0128379688f, 0.0101105049f, 0.00750469649f, 0.00528807146f, 0.00355420564f, 0.00228627678f, 0.00141099782f,
     0.000837039843f, 0.000477990863f, 0.000263056718f, 0.000139650758f, 7.15710557e-05f, 3.54333788e-05f, 1.69553314e-05f, 0},
};

VITOATS_INLINE __m512 gelu_avx512(__m512 x) {
  const __m512 size = _mm512_abs_ps(x);
  // the lowest bits of a float as large as this are those of the whole number that was added
  const __m512 last = _mm512_set1_ps((kGeluPieces - 1) * kGeluStep), whole = _mm512_set1_ps(3 << 22);
  const __m512i piece = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_min_ps(size, last), _mm512_set1_ps(1 / kGeluStep), whole));
  const auto coefficient = [&](const float* of_power) {
    return _mm512_permutex2var_ps(_mm512_load_ps(of_power), piece, _mm512_load_ps(of_power + 16));
  };
  __m512 sum = coefficient(kGelu[3]);
#pragma GCC unroll 3
  for (int i = 2; i >= 0; --i) sum = _mm512_fmadd_ps(sum, size, coefficient(kGelu[i]));
  return _mm512_fmadd_ps(x, _mm512_set1_ps(0.5f), sum);
}

}  // namespace
}  // namespace vitoats
