// The table of kernels: a row for each instruction set and type of the weights. Packing is a row's own affair, so that what a
// row reads in its inner loop is laid out as it likes.
//
// z = x V^T comes first, for all parts; y = x S^T + z U^T + bias then. Two regimes, by the number of tokens:
//   SpMM: tokens are transposed in tiles, so that one non-zero of S meets a vector of tokens (compute-bound; images).
//   SpMV: a vector of S is expanded from its values and mask, and meets up to kSpmvTokens tokens (memory-bound; decoding).
#pragma once

#include <cstdint>
#include <memory>

#include "weights.h"

namespace vitoats {

constexpr int kSpmvTokens = 8;   // up to here: SpMV
constexpr int kGroup = 16;       // rows of S; tasks begin at whole groups
constexpr int kMaxRows = 128;    // of S in a task
constexpr int kStrip = 64;       // columns of S: one word of the mask for each row
constexpr int kMaxStrips = 4;    // in one pass over the rows of a task
constexpr int kMaxVectors = 13;  // of tokens in a tile: as many accumulators, and registers are left for the operands

// Tokens of x, transposed: x [columns, stride], then z [z_rows, stride], where stride is a whole number of vectors; lanes of x
// past count are zero.
struct TokenTile {
  int64_t first, count;          // of the tokens of x
  int64_t stride;                // floats
  float* packed;
  uint8_t* non_finite;           // [count], set where a token has an infinity or NaN
};

// Where y goes, and the bias, which may be null.
struct Output {
  float* data;                   // [tokens, rows]
  const float* bias;             // [rows]
};

// A row of the table. But for pack_weights, no function allocates or throws. weights is what pack_weights made; the memory of
// the model's own weights must outlive it.
struct Kernels {
  const char* isa;
  ValueType value_type;
  int lanes;                     // floats of a vector

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

  // Arithmetic alone, fused multiply-adds on registers: returns the floating-point operations done.
  double (*fma)(int64_t rounds);
};

// The rows that this processor runs, best first, ended by nullptr.
const Kernels* const* available_kernels();

// The best row for a type, or that of the instruction set which the environment variable VITOATS_ISA names; nullptr if there is
// none such.
const Kernels* choose_kernels(ValueType type);

}  // namespace vitoats
