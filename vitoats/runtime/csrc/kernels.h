// The kernel table: a row for each instruction set and type of the weights. Each row packs the weights itself, in the layout
// that its inner loop needs.
//
// z = x V^T is computed first, for all parts, then y = x S^T + z U^T + bias. There are two regimes, by the number of tokens:
//   SpMM: tokens are transposed in tiles; one non-zero of S multiplies a vector of tokens (compute-bound; images).
//   SpMV: a vector of S is expanded from its values and mask, and multiplies up to kSpmvTokens tokens (memory-bound; decoding).
#pragma once

#include <cstdint>
#include <memory>

#include "weights.h"

namespace vitoats {

constexpr int kSpmvTokens = 8;   // largest number of tokens for SpMV
constexpr int kGroup = 16;       // rows of S in a group; tasks begin at whole groups
constexpr int kMaxRows = 128;    // rows of S in a task
constexpr int kStrip = 64;       // columns of S in a strip: one word of the mask per row
constexpr int kMaxStrips = 4;    // strips in one pass over the rows of a task
constexpr int kMaxVectors = 13;  // vectors of tokens in a tile: one accumulator each, with registers left for the operands

// A tile of transposed tokens: x [columns, stride], then z [z_rows, stride]. stride is a whole number of vectors; lanes of x
// past count are zero.
struct TokenTile {
  int64_t first, count;          // first token, and number of tokens
  int64_t stride;                // floats
  float* packed;
  uint8_t* non_finite;           // [count], set where a token has an infinity or NaN
};

// The memory for y, and the bias, which may be null.
struct Output {
  float* data;                   // [tokens, rows]
  const float* bias;             // [rows]
};

// A row of the table. Only pack_weights may allocate or throw. The argument weights is its result; the memory of the model's
// own weights must outlive it.
struct Kernels {
  const char* isa;
  ValueType value_type;
  int lanes;                     // floats in a vector

  std::shared_ptr<const void> (*pack_weights)(const Weights& weights);

  // Transposes columns [column, column_end) of x into a tile, and sets non_finite.
  void (*pack_tokens)(const float* x, int64_t columns, const TokenTile& tile, int64_t column, int64_t column_end);
  // Rows [row, row_end) of a tile's z.
  void (*spmm_project)(const void* weights, const TokenTile& tile, int64_t row, int64_t row_end);
  // y[tile, row..row_end); at most kMaxRows rows, and row a multiple of kGroup. A pass takes 1 to kMaxStrips strips.
  void (*spmm)(const void* weights, const TokenTile& tile, int64_t row, int64_t row_end, int strips, const Output& y);

  // z[0..tokens, row..row_end) for 1 to kSpmvTokens tokens; z is [tokens, z_rows].
  void (*spmv_project)(const void* weights, const float* x, int64_t tokens, int64_t row, int64_t row_end, float* z);
  // y[0..tokens, row..row_end).
  void (*spmv)(const void* weights, const float* x, const float* z, int64_t tokens, int64_t row, int64_t row_end,
               const Output& y);

  // Fused multiply-adds on registers only; returns the number of floating-point operations.
  double (*fma)(int64_t rounds);
};

// The best row for an instruction set that this processor supports (isa.h).
const Kernels& float_row(ValueType type, const char* isa);

}  // namespace vitoats
