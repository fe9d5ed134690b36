// The rows of the kernel table for float32 and float16 weights, built from a vector type V.
#pragma once

#include "spmm.h"
#include "spmv.h"

namespace vitoats {
namespace {

template <class V, class Value>
struct FloatKernels {
  static void spmm_project(const void* weights, const TokenTile& tile, int64_t row, int64_t row_end) {
    spmm::of_width<V, Value>(tile).project(*static_cast<const FloatWeights*>(weights), tile, row, row_end);
  }

  static void spmm(const void* weights, const TokenTile& tile, int64_t row, int64_t row_end, int strips, const Output& y) {
    spmm::of_width<V, Value>(tile).multiply(*static_cast<const FloatWeights*>(weights), tile, row, row_end, strips, y);
  }

  static void spmv_project(const void* weights, const float* x, int64_t tokens, int64_t row, int64_t row_end, float* z) {
    spmv::of_tokens<V, Value>(tokens).project(*static_cast<const FloatWeights*>(weights), x, row, row_end, z);
  }

  static void spmv(const void* weights, const float* x, const float* z, int64_t tokens, int64_t row, int64_t row_end,
                   const Output& y) {
    spmv::of_tokens<V, Value>(tokens).multiply(*static_cast<const FloatWeights*>(weights), x, z, row, row_end, y);
  }
};

// There are enough chains to hide the latency of an FMA; the sum prevents the compiler from removing them.
template <class V>
double fma(int64_t rounds) {
  constexpr int chains = 12;
  typename V::T sum[chains];
  const auto factor = V::set1(0.5f);
  for (auto& s : sum) s = V::set1(1.f);
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sum[c] = V::fmadd(sum[c], factor, factor);
  float total = 0;
  for (auto& s : sum) total += V::sum(s);
  return total > 0 ? 2.0 * chains * V::lanes * static_cast<double>(rounds) : 0;
}

template <class V, class Value>
constexpr Kernels float_kernels(const char* isa, ValueType type) {
  using Row = FloatKernels<V, Value>;
  return {isa,       type,  V::lanes, pack_float_weights, spmm::pack_tokens<V>, Row::spmm_project, Row::spmm, Row::spmv_project,
          Row::spmv, fma<V>};
}

}  // namespace
}  // namespace vitoats
