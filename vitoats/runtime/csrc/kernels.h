// The kernels, written once over a vector type V; each instruction set has a file that fills in V.
//
// V has: lanes; registers; T; zero(); load(p), loadu(p), store(p, v), storeu(p, v); set1(float); fmadd(a, b, c) = a b + c; add(a, b); sum(v);
// expand(packed, bits): the packed lanes in order to where bits are set, zero elsewhere; widen(p): lanes of float16 to float;
// transpose(source, source_stride, target, target_stride): a square of lanes x lanes; Tail: half a vector, or NoTail; half(v): its first half.
#pragma once

#include <cstring>
#include <utility>

#include "sparse_matmul.h"

namespace vitoats {
namespace {

// Everything here has internal linkage and uses no function template of the standard library: the linker keeps one copy of
// those, and it could be one with instructions that this processor lacks.

#define VITOATS_INLINE inline __attribute__((always_inline))

VITOATS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Stands where a block has no half vector at its end: takes part in nothing.
struct NoTail {
  struct T {};
  static constexpr int lanes = 0;
  static VITOATS_INLINE T zero() { return {}; }
  static VITOATS_INLINE T load(const float*) { return {}; }
  static VITOATS_INLINE void store(float*, T) {}
  template <class Weight>
  static VITOATS_INLINE T fmadd(Weight, T, T) { return {}; }
  static VITOATS_INLINE T add(T, T) { return {}; }
};

// The mask's bits for columns [column, column + n), n <= 64 and column a multiple of 8; reads no byte past the row's end.
VITOATS_INLINE uint64_t mask_bits(const uint8_t* row, int64_t stride, int64_t column, int n) {
  const int64_t from = column / 8;
  uint64_t bits = 0;
  if (stride - from >= 8) {
    std::memcpy(&bits, row + from, 8);
  } else {
    for (int64_t i = from; i < stride; ++i) bits |= static_cast<uint64_t>(row[i]) << (8 * (i - from));
  }
  return n == 64 ? bits : bits & ((uint64_t{1} << n) - 1);
}

template <class V>
VITOATS_INLINE typename V::T load_vector(const float* p) {
  return V::loadu(p);
}

template <class V>
VITOATS_INLINE typename V::T load_vector(const uint16_t* p) {
  return V::widen(p);
}

// A vector of values from p on, zero where they end; reads nothing past the end.
template <class V>
VITOATS_INLINE typename V::T load_values(const float* p, const float* end) {
  if (end - p >= V::lanes) return load_vector<V>(p);
  alignas(64) float padded[V::lanes] = {};
  if (p < end) std::memcpy(padded, p, static_cast<size_t>(end - p) * sizeof(float));
  return V::load(padded);
}

template <class V>
VITOATS_INLINE typename V::T load_values(const uint16_t* p, const uint16_t* end) {
  if (end - p >= V::lanes) return load_vector<V>(p);
  alignas(64) uint16_t padded[V::lanes] = {};
  if (p < end) std::memcpy(padded, p, static_cast<size_t>(end - p) * sizeof(uint16_t));
  return V::widen(padded);
}

// n <= 64 values as floats: where they are, or widened into a buffer.
template <class V>
VITOATS_INLINE const float* as_floats(const float* values, const float*, int, float*) {
  return values;
}

template <class V>
VITOATS_INLINE const float* as_floats(const uint16_t* values, const uint16_t* end, int n, float* buffer) {
  for (int i = 0; i < n; i += V::lanes) V::store(buffer + i, load_values<V>(values + i, end));
  return buffer;
}

// target [columns, rows] = source [rows, columns] transposed; at most a square of lanes.
template <class V>
VITOATS_INLINE void transpose(const float* source, int64_t source_stride, int64_t rows, int64_t columns, float* target,
                              int64_t target_stride) {
  if (rows == V::lanes && columns == V::lanes) return V::transpose(source, source_stride, target, target_stride);
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < rows; ++j) target[i * target_stride + j] = source[j * source_stride + i];
}

template <class V>
void pack(const float* x, int64_t columns, const TokenBlock& block, int64_t column, int64_t column_end) {
  for (int64_t lane = 0; lane < block.stride; lane += V::lanes) {
    const int64_t tokens = smaller(V::lanes, block.count - lane);
    const float* source = x + (block.first + lane) * columns;
    for (int64_t k = column; k < column_end; k += V::lanes) {
      const int64_t width = smaller(V::lanes, column_end - k);
      float* target = block.packed + k * block.stride + lane;
      transpose<V>(source + k, columns, tokens, width, target, block.stride);
      for (int64_t i = 0; i < width; ++i)
        for (int64_t j = tokens; j < V::lanes; ++j) target[i * block.stride + j] = 0.f;
    }
  }
}

// One row's sums over a block of tokens, in registers. Few vectors are summed in several chains, for a fused multiply-add takes
// longer than its turn.
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

  // The non-zeros where n bits are set.
  VITOATS_INLINE void add_word(uint64_t bits, int n, const float* values, const float* activations) {
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

// target [n] += bias [n].
template <class V>
VITOATS_INLINE void add_bias(const float* bias, int64_t n, float* target) {
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) V::storeu(target + i, V::add(V::loadu(target + i), V::loadu(bias + i)));
  for (; i < n; ++i) target[i] += bias[i];
}

// sums [R, stride] (+)= weights [R, n] activations [n, stride], the rows of weights w_stride apart, n <= 64. Each vector of
// activations is loaded once for R rows.
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

// sums [rows, stride] (+)= weights [rows, columns] activations [columns, stride]; end is that of all weights.
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
void project_rows(const PackedMatrix& S, const TokenBlock& block, int64_t row, int64_t row_end) {
  const LowRank& low_rank = S.low_rank;
  const Value* weights = static_cast<const Value*>(low_rank.V);
  const Value* end = weights + low_rank.blocks * low_rank.rank * S.columns;
  float* z = block.packed + (S.columns + row) * block.stride;
  dense<V, Value, M, Tail>(weights + row * S.columns, row_end - row, S.columns, end, block.packed, z, false);
}

// sums [rows, stride] += U z, for the rows from row on.
template <class V, class Value, int M, class Tail>
void add_low_rank(const PackedMatrix& S, const TokenBlock& block, int64_t row, int64_t row_end, float* sums) {
  const LowRank& low_rank = S.low_rank;
  const Value* weights = static_cast<const Value*>(low_rank.U);
  const Value* end = weights + S.rows * low_rank.rank;
  const int64_t of_block = S.rows / low_rank.blocks;
  while (row < row_end) {
    const int64_t b = row / of_block, n = smaller((b + 1) * of_block, row_end) - row;
    const float* z = block.packed + (S.columns + b * low_rank.rank) * block.stride;
    dense<V, Value, M, Tail>(weights + row * low_rank.rank, n, low_rank.rank, end, z, sums, true);
    sums += n * block.stride;
    row += n;
  }
}

template <class V, class Value, int M, class Tail>
void many_rows(const PackedMatrix& S, const TokenBlock& block, int64_t row, int64_t row_end, int words, const Output& y) {
  using Sums = RowSums<V, M, Tail>;
  alignas(64) float sums[kMaxRows * Sums::stride];
  alignas(64) float widened[64];
  const Value* end = static_cast<const Value*>(S.values) + S.n_values;
  const int64_t rows = row_end - row;
  for (int64_t tile = 0; tile < S.tiles; tile += words) {
    const int n_words = static_cast<int>(smaller(words, S.tiles - tile));
    const Value* values[kMaxWords];
    const uint64_t* masks[kMaxWords];
    for (int w = 0; w < n_words; ++w) {
      values[w] = static_cast<const Value*>(S.values) + S.start[(tile + w) * S.groups + row / kGroup];
      masks[w] = S.masks + (tile + w) * S.rows + row;
    }
    const float* activations = block.packed + tile * 64 * Sums::stride;
    for (int64_t r = 0; r < rows; ++r) {
      Sums sum;
      sum.load(sums + r * Sums::stride, tile == 0);
      for (int w = 0; w < n_words; ++w) {
        const uint64_t bits = masks[w][r];
        const int n = __builtin_popcountll(bits);
        sum.add_word(bits, n, as_floats<V>(values[w], end, n, widened), activations + w * 64 * Sums::stride);
        values[w] += n;
      }
      sum.store(sums + r * Sums::stride);
    }
  }
  if (S.low_rank.rank) add_low_rank<V, Value, M, Tail>(S, block, row, row_end, sums);
  for (int64_t lane = 0; lane < block.count; lane += V::lanes) {
    const int64_t tokens = smaller(V::lanes, block.count - lane);
    for (int64_t r = 0; r < rows; r += V::lanes)
      transpose<V>(sums + r * Sums::stride + lane, Sums::stride, smaller(V::lanes, rows - r), tokens,
                   y.data + (block.first + lane) * S.rows + row + r, S.rows);
    for (int64_t t = 0; y.bias && t < tokens; ++t)
      add_bias<V>(y.bias + row, rows, y.data + (block.first + lane + t) * S.rows + row);
  }
}

// What is done with a block of one width.
struct OfBlock {
  void (*project)(const PackedMatrix&, const TokenBlock&, int64_t, int64_t);
  void (*many)(const PackedMatrix&, const TokenBlock&, int64_t, int64_t, int, const Output&);
};

template <class V, class Value, class Tail, class Numbers>
struct BlockTable;  // by the number of vectors less 1; the last of them is half, if there is a tail

template <class V, class Value, class Tail, int... M>
struct BlockTable<V, Value, Tail, std::integer_sequence<int, M...>> {
  static constexpr int whole = Tail::lanes == 0;
  static constexpr OfBlock entry[] = {{project_rows<V, Value, M + whole, Tail>, many_rows<V, Value, M + whole, Tail>}...};
};

// Picks the instances for a block; its last vector is half where the last tokens fill no more.
template <class V, class Value>
const OfBlock& pick(const TokenBlock& block) {
  using Numbers = std::make_integer_sequence<int, kMaxVectors>;
  const bool half = V::Tail::lanes > 0 && block.stride - block.count >= V::Tail::lanes;
  const OfBlock* table = half ? BlockTable<V, Value, typename V::Tail, Numbers>::entry : BlockTable<V, Value, NoTail, Numbers>::entry;
  return table[block.stride / V::lanes - 1];
}

template <class V>
void project(const PackedMatrix& S, const TokenBlock& block, int64_t row, int64_t row_end) {
  (S.half ? pick<V, uint16_t>(block) : pick<V, float>(block)).project(S, block, row, row_end);
}

template <class V>
void many(const PackedMatrix& S, const TokenBlock& block, int64_t row, int64_t row_end, int words, const Output& y) {
  (S.half ? pick<V, uint16_t>(block) : pick<V, float>(block)).many(S, block, row, row_end, words, y);
}

// Asks for n values from p on.
template <class Value>
VITOATS_INLINE void prefetch(const Value* p, int n) {
  constexpr int line = 64 / static_cast<int>(sizeof(Value));
  for (int i = 0; i < n; i += line) __builtin_prefetch(p + i, 0, 2);
}

// R rows at once with all T tokens: R T sums. Careful: some values lie less than a vector before the end.
template <class V, class Value, int R, int T, bool careful>
VITOATS_INLINE void few_rows(const SparseMatrix& S, const float* x, const float* x_end, int64_t row, float* y, bool add) {
  const Value* values = static_cast<const Value*>(S.values);
  const Value* end = values + S.row_start[S.rows];
  const Value* next[R];
  typename V::T sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    next[r] = values + S.row_start[row + r];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = V::zero();
  }
  const auto step = [&](const uint64_t (&bits)[R], int from, const float* tokens, int64_t stride) __attribute__((always_inline)) {
    typename V::T w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto part = static_cast<uint32_t>(bits[r] >> from) & ((1u << V::lanes) - 1);
      w[r] = V::expand(careful ? load_values<V>(next[r], end) : load_vector<V>(next[r]), part);
      next[r] += __builtin_popcount(part);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const auto lanes = V::loadu(tokens + t * stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][t] = V::fmadd(w[r], lanes, sum[r][t]);
    }
  };
  const uint8_t* mask = S.mask + row * S.mask_stride;
  const int64_t ahead = S.row_start[row + R] - S.row_start[row];  // about where the next rows are
  uint64_t bits[R];
  int64_t k = 0;
  for (; k + 64 <= S.columns; k += 64) {
    for (int r = 0; r < R; ++r) {
      std::memcpy(&bits[r], mask + r * S.mask_stride + k / 8, 8);
      if (!careful) prefetch(next[r] + ahead, 32);
    }
#pragma GCC unroll 4
    for (int from = 0; from < 64; from += V::lanes) step(bits, from, x + k + from, S.columns);
  }
  if (k < S.columns) {
    for (int r = 0; r < R; ++r) bits[r] = mask_bits(mask + r * S.mask_stride, S.mask_stride, k, 64);
    for (int from = 0; k + from < S.columns; from += V::lanes) step(bits, from, x_end + from, 64);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float& target = y[t * S.rows + row + r];
      target = (add ? target : 0) + V::sum(sum[r][t]);
    }
}

template <class V, class Value, int T>
void few_tokens(const SparseMatrix& S, const float* x, int64_t row, int64_t row_end, const Output& y, bool add) {
  const int64_t first = row;
  constexpr int R = T <= 2 ? 4 : 2;
  alignas(64) float x_end[T][64] = {};  // the columns past the last 64
  const int64_t whole = S.columns / 64 * 64;
  for (int t = 0; t < T; ++t)
    for (int64_t k = whole; k < S.columns; ++k) x_end[t][k - whole] = x[t * S.columns + k];
  const int64_t safe = S.row_start[S.rows] - V::lanes;  // a vector that begins here ends within the values
  for (; row + R <= row_end && S.row_start[row + R] <= safe; row += R) few_rows<V, Value, R, T, false>(S, x, x_end[0], row, y.data, add);
  for (; row < row_end; ++row) few_rows<V, Value, 1, T, true>(S, x, x_end[0], row, y.data, add);
  for (int t = 0; y.bias && t < T; ++t) add_bias<V>(y.bias + first, row_end - first, y.data + t * S.rows + first);
}

using FewTokens = void (*)(const SparseMatrix&, const float*, int64_t, int64_t, const Output&, bool);

template <class V, class Value, class Numbers>
struct FewTable;  // by the number of tokens, less 1

template <class V, class Value, int... T>
struct FewTable<V, Value, std::integer_sequence<int, T...>> {
  static constexpr FewTokens entry[] = {few_tokens<V, Value, T + 1>...};
};

template <class V>
void few(const SparseMatrix& S, const float* x, int64_t tokens, int64_t row, int64_t row_end, const Output& y, bool add) {
  using Numbers = std::make_integer_sequence<int, kFewTokens>;
  (S.half ? FewTable<V, uint16_t, Numbers>::entry : FewTable<V, float, Numbers>::entry)[tokens - 1](S, x, row, row_end, y, add);
}

// Chains enough to hide the latency of a fused multiply-add; the sum keeps the compiler from dropping them.
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

template <class V>
constexpr Kernels kernels_of(const char* name) {
  return {name, V::lanes, pack<V>, project<V>, many<V>, few<V>, fma<V>};
}

}  // namespace
}  // namespace vitoats
