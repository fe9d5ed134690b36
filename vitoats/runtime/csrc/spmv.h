// SpMV, for up to kSpmvTokens tokens: each vector of weights multiplies all T tokens, R rows at a time, into R T sums. Values
// and mask are read once, from the model's own memory.
#pragma once

#include <utility>

#include "simd.h"

namespace vitoats {
namespace {
namespace spmv {

template <int T>
constexpr int kRows = T <= 2 ? 4 : 2;  // in a step: the sums leave registers for the weights

// The bits of a row's last columns, starting at a multiple of 8; reads no byte past the row's end.
VITOATS_INLINE uint64_t last_bits(const uint8_t* row, int64_t stride, int64_t column) {
  uint64_t bits = 0;
  for (int64_t i = column / 8; i < stride; ++i) bits |= static_cast<uint64_t>(row[i]) << (8 * i - column);
  return bits;
}

// careful: less than a whole vector of weights may be left before the end.
template <class V, bool careful, class Value>
VITOATS_INLINE typename V::T load_weights(const Value* p, const Value* end) {
  return careful ? load_values<V>(p, end) : load_vector<V>(p);
}

// Prefetches n values from p on.
template <class Value>
VITOATS_INLINE void prefetch(const Value* p, int n) {
  constexpr int line = 64 / static_cast<int>(sizeof(Value));
  for (int i = 0; i < n; i += line) __builtin_prefetch(p + i, 0, 2);
}

// y[t, row + r] = S[row + r] x[t]. x_end [T, kStrip] holds the columns past the last whole strip, padded with zeros.
template <class V, class Value, int R, int T, bool careful>
VITOATS_INLINE void sparse_rows(const FloatWeights& weights, const float* x, const float* x_end, int64_t row, float* y) {
  const SparseMatrix& S = weights.model.S;
  const Value* values = static_cast<const Value*>(S.values);
  const Value* end = values + S.n_values;
  const Value* next[R];
  typename V::T sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    next[r] = values + weights.row_start[row + r];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = V::zero();
  }
  const auto step = [&](const uint64_t (&bits)[R], int from, const float* tokens, int64_t stride) __attribute__((always_inline)) {
    typename V::T w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto kept = static_cast<uint32_t>(bits[r] >> from) & ((1u << V::lanes) - 1);
      w[r] = V::expand(load_weights<V, careful>(next[r], end), kept);
      next[r] += __builtin_popcount(kept);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const auto lanes = V::loadu(tokens + t * stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][t] = V::fmadd(w[r], lanes, sum[r][t]);
    }
  };
  const uint8_t* mask = S.mask + row * S.mask_stride;
  const int64_t ahead = weights.row_start[row + R] - weights.row_start[row];  // about the distance to the next rows
  uint64_t bits[R];
  int64_t k = 0;
  for (; k + kStrip <= S.columns; k += kStrip) {
    for (int r = 0; r < R; ++r) {
      std::memcpy(&bits[r], mask + r * S.mask_stride + k / 8, 8);
      if (!careful) prefetch(next[r] + ahead, 32);
    }
#pragma GCC unroll 4
    for (int from = 0; from < kStrip; from += V::lanes) step(bits, from, x + k + from, S.columns);
  }
  if (k < S.columns) {
    for (int r = 0; r < R; ++r) bits[r] = last_bits(mask + r * S.mask_stride, S.mask_stride, k);
    for (int from = 0; k + from < S.columns; from += V::lanes) step(bits, from, x_end + from, kStrip);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) y[t * S.rows + row + r] = V::sum(sum[r][t]);
}

template <class V, class Value, int T>
void sparse(const FloatWeights& weights, const float* x, int64_t row, int64_t row_end, float* y) {
  const SparseMatrix& S = weights.model.S;
  alignas(64) float x_end[T][kStrip] = {};
  const int64_t whole = S.columns / kStrip * kStrip;
  for (int t = 0; t < T; ++t)
    for (int64_t k = whole; k < S.columns; ++k) x_end[t][k - whole] = x[t * S.columns + k];
  constexpr int R = kRows<T>;
  const int64_t safe = S.n_values - V::lanes;  // a vector that begins here ends within the values
  for (; row + R <= row_end && weights.row_start[row + R] <= safe; row += R)
    sparse_rows<V, Value, R, T, false>(weights, x, x_end[0], row, y);
  for (; row < row_end; ++row) sparse_rows<V, Value, 1, T, true>(weights, x, x_end[0], row, y);
}

// The product of a dense matrix [rows, columns] with x, stored in y or added to it.
template <class Value>
struct Dense {
  const Value* weights;
  const Value* end;             // of the tensor that the matrix is part of
  int64_t columns;
  const float* x;               // [T, x_stride]
  int64_t x_stride;
  float* y;                     // [T, y_stride]
  int64_t y_stride;
  bool add;
};

// x_end [T, lanes] holds the columns past the last whole vector, padded with zeros, which multiply only finite numbers.
template <class V, class Value, int R, int T, bool careful>
VITOATS_INLINE void dense_rows(const Dense<Value>& m, const float* x_end, int64_t row) {
  const Value* weights = m.weights + row * m.columns;
  typename V::T sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = V::zero();
  const auto step = [&](int64_t k, const float* tokens, int64_t stride) __attribute__((always_inline)) {
    typename V::T w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = load_weights<V, careful>(weights + r * m.columns + k, m.end);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const auto lanes = V::loadu(tokens + t * stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][t] = V::fmadd(w[r], lanes, sum[r][t]);
    }
  };
  int64_t k = 0;
  for (; k + V::lanes <= m.columns; k += V::lanes) step(k, m.x + k, m.x_stride);
  if (k < m.columns) step(k, x_end, V::lanes);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float& target = m.y[t * m.y_stride + row + r];
      target = (m.add ? target : 0) + V::sum(sum[r][t]);
    }
}

template <class V, class Value, int T>
void dense(const Dense<Value>& m, int64_t rows) {
  alignas(64) float x_end[T][V::lanes] = {};
  const int64_t whole = m.columns / V::lanes * V::lanes;
  for (int t = 0; t < T; ++t)
    for (int64_t k = whole; k < m.columns; ++k) x_end[t][k - whole] = m.x[t * m.x_stride + k];
  constexpr int R = kRows<T>;
  int64_t row = 0;
  for (; row + R <= rows && m.end - (m.weights + (row + R) * m.columns) >= V::lanes; row += R)
    dense_rows<V, Value, R, T, false>(m, x_end[0], row);
  for (; row < rows; ++row) dense_rows<V, Value, 1, T, true>(m, x_end[0], row);
}

template <class V, class Value, int T>
void project(const FloatWeights& weights, const float* x, int64_t row, int64_t row_end, float* z) {
  const int64_t columns = weights.model.S.columns, z_rows = weights.model.z_rows();
  const Value* V_rows = static_cast<const Value*>(weights.model.low_rank.V);
  const Value* end = V_rows + z_rows * columns;
  dense<V, Value, T>({V_rows + row * columns, end, columns, x, columns, z + row, z_rows, false}, row_end - row);
}

// y[t, row..row_end) += U z[t].
template <class V, class Value, int T>
void add_low_rank(const FloatWeights& weights, const float* z, int64_t row, int64_t row_end, float* y) {
  const LowRank& low_rank = weights.model.low_rank;
  const int64_t rows = weights.model.S.rows, rank = low_rank.rank, rows_of_part = rows / low_rank.parts;
  const Value* U_rows = static_cast<const Value*>(low_rank.U);
  const Value* end = U_rows + rows * rank;
  while (row < row_end) {
    const int64_t part = row / rows_of_part, n = smaller((part + 1) * rows_of_part, row_end) - row;
    const float* z_of_part = z + part * rank;
    dense<V, Value, T>({U_rows + row * rank, end, rank, z_of_part, weights.model.z_rows(), y + row, rows, true}, n);
    row += n;
  }
}

template <class V, class Value, int T>
void multiply(const FloatWeights& weights, const float* x, const float* z, int64_t row, int64_t row_end, const Output& y) {
  const int64_t rows = weights.model.S.rows;
  sparse<V, Value, T>(weights, x, row, row_end, y.data);
  for (int t = 0; y.bias && t < T; ++t) add_bias<V>(y.bias + row, row_end - row, y.data + t * rows + row);
  if (weights.model.low_rank.rank) add_low_rank<V, Value, T>(weights, z, row, row_end, y.data);
}

// The template instances for one number of tokens.
struct OfTokens {
  void (*project)(const FloatWeights&, const float*, int64_t, int64_t, float*);
  void (*multiply)(const FloatWeights&, const float*, const float*, int64_t, int64_t, const Output&);
};

template <class V, class Value, class Numbers>
struct TokenTable;  // indexed by the number of tokens minus 1

template <class V, class Value, int... T>
struct TokenTable<V, Value, std::integer_sequence<int, T...>> {
  static constexpr OfTokens entry[] = {{project<V, Value, T + 1>, multiply<V, Value, T + 1>}...};
};

template <class V, class Value>
const OfTokens& of_tokens(int64_t tokens) {
  return TokenTable<V, Value, std::make_integer_sequence<int, kSpmvTokens>>::entry[tokens - 1];
}

}  // namespace spmv
}  // namespace
}  // namespace vitoats
