// SpMM, for more than kSpmvTokens tokens, works on tiles of transposed tokens. A strip of the tile stays in the L1 cache during
// a pass over the rows of a task; a row's sums over the tile stay in registers.
//
// M: whole vectors of tokens in a tile. Tail: NoTail, or half a vector after them.
#pragma once

#include <utility>

#include "simd.h"

namespace vitoats {
namespace {
namespace spmm {

// n <= 64 values as floats: in place, or widened into a buffer.
template <class V>
VITOATS_INLINE const float* as_floats(const float* values, const float*, int, float*) {
  return values;
}

template <class V>
VITOATS_INLINE const float* as_floats(const uint16_t* values, const uint16_t* end, int n, float* buffer) {
  for (int i = 0; i < n; i += V::lanes) V::store(buffer + i, load_values<V>(values + i, end));
  return buffer;
}

// target [columns, rows] = source [rows, columns] transposed; at most lanes x lanes.
template <class V>
VITOATS_INLINE void transpose(const float* source, int64_t source_stride, int64_t rows, int64_t columns, float* target,
                              int64_t target_stride) {
  if (rows == V::lanes && columns == V::lanes) return V::transpose(source, source_stride, target, target_stride);
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < rows; ++j) target[i * target_stride + j] = source[j * source_stride + i];
}

// The sum of x * 0 over a token is NaN if it contains an infinity or NaN, else 0. It is cheap here, where x is loaded anyway.
template <class V>
void pack_tokens(const float* x, int64_t columns, const TokenTile& tile, int64_t column, int64_t column_end) {
  for (int64_t lane = 0; lane < tile.stride; lane += V::lanes) {
    const int64_t tokens = smaller(V::lanes, tile.count - lane);
    const float* source = x + (tile.first + lane) * columns;
    auto zeros = V::zero();
    for (int64_t k = column; k < column_end; k += V::lanes) {
      const int64_t width = smaller(V::lanes, column_end - k);
      float* target = tile.packed + k * tile.stride + lane;
      transpose<V>(source + k, columns, tokens, width, target, tile.stride);
      for (int64_t i = 0; i < width; ++i) {
        for (int64_t j = tokens; j < V::lanes; ++j) target[i * tile.stride + j] = 0.f;
        zeros = V::fmadd(V::load(target + i * tile.stride), V::zero(), zeros);
      }
    }
    if (V::sum(zeros) == 0) continue;
    alignas(64) float each[V::lanes];
    V::store(each, zeros);
    for (int64_t j = 0; j < tokens; ++j)
      if (each[j] != 0) __atomic_store_n(tile.non_finite + lane + j, uint8_t{1}, __ATOMIC_RELAXED);  // other tasks may, too
  }
}

// One row's sums over a tile of tokens, in registers. With few vectors there are several chains of sums, since the latency of
// an FMA is longer than its issue interval.
template <class V, int M, class Tail>
struct RowSums {
  static constexpr int vectors = M + (Tail::lanes > 0), stride = vectors * V::lanes;
  static constexpr int chains = vectors == 1 ? 4 : vectors < 6 ? 2 : 1;
  typename V::T whole[chains][M > 0 ? M : 1];
  typename Tail::T tail[chains];

  VITOATS_INLINE void load(const float* sums, bool first) {
#pragma GCC unroll 4
    for (int c = 0; c < chains; ++c) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) whole[c][m] = c || first ? V::zero() : V::load(sums + m * V::lanes);
      tail[c] = c || first ? Tail::zero() : Tail::load(sums + M * V::lanes);
    }
  }

  VITOATS_INLINE void add(int c, float value, const float* tokens) {
    const auto w = V::set1(value);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) whole[c][m] = V::fmadd(w, V::load(tokens + m * V::lanes), whole[c][m]);
    tail[c] = Tail::fmadd(V::half(w), Tail::load(tokens + M * V::lanes), tail[c]);
  }

  // Adds the n non-zeros of a strip.
  VITOATS_INLINE void add_strip(uint64_t bits, int n, const float* values, const float* activations) {
    const auto next = [&](int c) __attribute__((always_inline)) {
      add(c % chains, *values++, activations + __builtin_ctzll(bits) * stride);
      bits &= bits - 1;
    };
    for (int i = n / 4; i > 0; --i) next(0), next(1), next(2), next(3);
    if (n & 2) next(0), next(1);  // fewer branches to mispredict than one for each non-zero
    if (n & 1) next(2);
  }

  VITOATS_INLINE void store(float* sums) {
#pragma GCC unroll 4
    for (int c = 1; c < chains; ++c) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) whole[0][m] = V::add(whole[0][m], whole[c][m]);
      tail[0] = Tail::add(tail[0], tail[c]);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) V::store(sums + m * V::lanes, whole[0][m]);
    Tail::store(sums + M * V::lanes, tail[0]);
  }
};

// sums [R, stride] (+)= weights [R, n] activations [n, stride] with n <= 64; w_stride is the distance between rows of weights.
// Each vector of activations is loaded once for R rows.
template <class V, class Value, int M, class Tail, int R>
VITOATS_INLINE void dense_rows(const Value* weights, int64_t w_stride, const Value* end, int n, const float* activations,
                               float* sums, bool add) {
  constexpr int stride = (M + (Tail::lanes > 0)) * V::lanes;
  alignas(64) float widened[R][64];
  const float* w[R];
  typename V::T whole[R][M > 0 ? M : 1];
  typename Tail::T tail[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    w[r] = as_floats<V>(weights + r * w_stride, end, n, widened[r]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) whole[r][m] = add ? V::load(sums + r * stride + m * V::lanes) : V::zero();
    tail[r] = add ? Tail::load(sums + r * stride + M * V::lanes) : Tail::zero();
  }
  for (int k = 0; k < n; ++k, activations += stride) {
    typename V::T value[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) value[r] = V::set1(w[r][k]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const auto tokens = V::load(activations + m * V::lanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) whole[r][m] = V::fmadd(value[r], tokens, whole[r][m]);
    }
    const auto tokens = Tail::load(activations + M * V::lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) tail[r] = Tail::fmadd(V::half(value[r]), tokens, tail[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) V::store(sums + r * stride + m * V::lanes, whole[r][m]);
    Tail::store(sums + r * stride + M * V::lanes, tail[r]);
  }
}

// sums [rows, stride] (+)= weights [rows, columns] activations [columns, stride]; end is the end of the whole weight tensor.
template <class V, class Value, int M, class Tail>
void dense(const Value* weights, int64_t rows, int64_t columns, const Value* end, const float* activations, float* sums,
           bool add) {
  constexpr int vectors = M + (Tail::lanes > 0), stride = vectors * V::lanes;
  constexpr int fitting = (V::registers - 1) / (vectors + 1), R = fitting > 4 ? 4 : fitting < 1 ? 1 : fitting;
  for (int64_t k = 0; k < columns; k += 64, activations += 64 * stride) {
    const int n = static_cast<int>(smaller(64, columns - k));
    int64_t r = 0;
    for (; r + R <= rows; r += R)
      dense_rows<V, Value, M, Tail, R>(weights + r * columns + k, columns, end, n, activations, sums + r * stride, add || k);
    for (; r < rows; ++r)
      dense_rows<V, Value, M, Tail, 1>(weights + r * columns + k, columns, end, n, activations, sums + r * stride, add || k);
  }
}

template <class V, class Value, int M, class Tail>
void project(const FloatWeights& weights, const TokenTile& tile, int64_t row, int64_t row_end) {
  const int64_t columns = weights.model.S.columns;
  const Value* V_rows = static_cast<const Value*>(weights.model.low_rank.V);
  const Value* end = V_rows + weights.model.z_rows() * columns;
  float* z = tile.packed + (columns + row) * tile.stride;
  dense<V, Value, M, Tail>(V_rows + row * columns, row_end - row, columns, end, tile.packed, z, false);
}

// sums [row_end - row, stride] += U z for rows [row, row_end).
template <class V, class Value, int M, class Tail>
void add_low_rank(const FloatWeights& weights, const TokenTile& tile, int64_t row, int64_t row_end, float* sums) {
  const LowRank& low_rank = weights.model.low_rank;
  const int64_t rows_of_part = weights.model.S.rows / low_rank.parts;
  const Value* U_rows = static_cast<const Value*>(low_rank.U);
  const Value* end = U_rows + weights.model.S.rows * low_rank.rank;
  while (row < row_end) {
    const int64_t part = row / rows_of_part, n = smaller((part + 1) * rows_of_part, row_end) - row;
    const float* z = tile.packed + (weights.model.S.columns + part * low_rank.rank) * tile.stride;
    dense<V, Value, M, Tail>(U_rows + row * low_rank.rank, n, low_rank.rank, end, z, sums, true);
    sums += n * tile.stride;
    row += n;
  }
}

template <class V, class Value, int M, class Tail>
void multiply(const FloatWeights& weights, const TokenTile& tile, int64_t row, int64_t row_end, int max_strips, const Output& y) {
  using Sums = RowSums<V, M, Tail>;
  alignas(64) float sums[kMaxRows * Sums::stride];
  alignas(64) float widened[kStrip];
  const SparseMatrix& S = weights.model.S;
  const Value* all_values = static_cast<const Value*>(weights.values);
  const Value* end = all_values + S.n_values;
  const int64_t rows = row_end - row;
  for (int64_t strip = 0; strip < weights.strips; strip += max_strips) {
    const int n_strips = static_cast<int>(smaller(max_strips, weights.strips - strip));
    const Value* values[kMaxStrips];
    const uint64_t* masks[kMaxStrips];
    for (int s = 0; s < n_strips; ++s) {
      values[s] = all_values + weights.group_start[(strip + s) * weights.groups + row / kGroup];
      masks[s] = weights.masks + (strip + s) * S.rows + row;
    }
    const float* activations = tile.packed + strip * kStrip * Sums::stride;
    for (int64_t r = 0; r < rows; ++r) {
      Sums sum;
      sum.load(sums + r * Sums::stride, strip == 0);
      for (int s = 0; s < n_strips; ++s) {
        const uint64_t bits = masks[s][r];
        const int n = __builtin_popcountll(bits);
        sum.add_strip(bits, n, as_floats<V>(values[s], end, n, widened), activations + s * kStrip * Sums::stride);
        values[s] += n;
      }
      sum.store(sums + r * Sums::stride);
    }
  }
  if (weights.model.low_rank.rank) add_low_rank<V, Value, M, Tail>(weights, tile, row, row_end, sums);
  for (int64_t lane = 0; lane < tile.count; lane += V::lanes) {
    const int64_t tokens = smaller(V::lanes, tile.count - lane);
    for (int64_t r = 0; r < rows; r += V::lanes)
      transpose<V>(sums + r * Sums::stride + lane, Sums::stride, smaller(V::lanes, rows - r), tokens,
                   y.data + (tile.first + lane) * S.rows + row + r, S.rows);
    for (int64_t t = 0; y.bias && t < tokens; ++t)
      add_bias<V>(y.bias + row, rows, y.data + (tile.first + lane + t) * S.rows + row);
  }
}

// The template instances for tiles of one width.
struct OfWidth {
  void (*project)(const FloatWeights&, const TokenTile&, int64_t, int64_t);
  void (*multiply)(const FloatWeights&, const TokenTile&, int64_t, int64_t, int, const Output&);
};

template <class V, class Value, class Tail, class Numbers>
struct WidthTable;  // indexed by the number of vectors minus 1; with a tail, the last vector is a half

template <class V, class Value, class Tail, int... M>
struct WidthTable<V, Value, Tail, std::integer_sequence<int, M...>> {
  static constexpr int whole = Tail::lanes == 0;
  static constexpr OfWidth entry[] = {{project<V, Value, M + whole, Tail>, multiply<V, Value, M + whole, Tail>}...};
};

// The last vector of a tile is a half if the last tokens fit into one.
template <class V, class Value>
const OfWidth& of_width(const TokenTile& tile) {
  using Numbers = std::make_integer_sequence<int, kMaxVectors>;
  const bool half = V::Tail::lanes > 0 && tile.stride - tile.count >= V::Tail::lanes;
  const int64_t i = tile.stride / V::lanes - 1;
  return half ? WidthTable<V, Value, typename V::Tail, Numbers>::entry[i] : WidthTable<V, Value, NoTail, Numbers>::entry[i];
}

}  // namespace spmm
}  // namespace
}  // namespace vitoats
