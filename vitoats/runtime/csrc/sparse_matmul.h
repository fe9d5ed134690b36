// The product y = x (S + U V)^T + bias with a sparse S, apart from any runtime.
//
//   x [tokens, columns] and y [tokens, rows], float32, row-major; S [rows, columns] as a bit mask and its values in row order;
//   U V of low rank, on its own for each of equal blocks of rows (a fused qkv has three). z = x V^T is computed first, for all
//   blocks of rows; it then stands beside x as more inputs, with U as their weights.
//
// Two regimes, by the number of tokens:
//   many: the activations are transposed, so that one non-zero of S meets a vector of tokens; a tile of them stays in the first
//         level cache while the rows of S pass by (compute-bound; images).
//   few:  a vector of S is unpacked from its values and mask, and meets all tokens at once (memory-bound; decoding).
// The first reads a copy of S in the order in which it passes, so that memory streams; the second reads the model's own, and
// takes U and V for sparse matrices too, of which it has nothing but the masks to make.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace vitoats {

struct SparseMatrix {
  int64_t rows, columns;
  int64_t mask_stride;          // bytes of a row of the mask, ceil(columns / 8)
  const uint8_t* mask;          // [rows, mask_stride], least significant bit first, zero past the last column
  const void* values;           // [row_start[rows]], float32 or float16
  bool half;                    // float16
  const int64_t* row_start;     // [rows + 1], where each row's values begin
};

// The term U V, in the type of S's values. Rank 0: there is none.
struct LowRank {
  int64_t blocks, rank;         // of rows, and of each
  const void* U;                // [blocks, rows / blocks, rank]
  const void* V;                // [blocks, rank, columns]
};

// S in tiles of 64 columns, rows within a tile: one word of the mask for each, and its values. U and V as they are.
struct PackedMatrix {
  int64_t rows, columns;
  int64_t tiles, groups;        // groups of kGroup rows
  int64_t n_values;
  const uint64_t* masks;        // [tiles, rows]
  const void* values;           // [n_values]
  const int64_t* start;         // [tiles, groups], where the values of a tile's group begin
  bool half;
  LowRank low_rank;
};

constexpr int kGroup = 16;      // tasks begin at whole groups of rows
constexpr int kMaxWords = 4;    // of the mask, for a row in one pass
constexpr int kFewTokens = 8;   // up to here: the regime of few tokens
constexpr int kMaxVectors = 13; // of tokens in a block: as many accumulators, and registers are left for the operands
constexpr int kMaxRows = 128;   // of S in a task

// Where y goes, and the bias, which may be null.
struct Output {
  float* data;                  // [tokens, rows]
  const float* bias;            // [rows]
};

// A block of tokens, transposed: x [columns, stride], then z [blocks of rows, rank, stride], where stride is a whole number of
// vectors; lanes of x past count are zero.
struct TokenBlock {
  int64_t first, count;         // of the tokens of x
  int64_t stride;               // floats
  float* packed;
};

// The kernels of one instruction set. None of them allocates or throws.
struct Kernels {
  const char* name;
  int lanes;                    // floats of a vector
  // Fills columns [column, column_end) of a block.
  void (*pack)(const float* x, int64_t columns, const TokenBlock& block, int64_t column, int64_t column_end);
  // Rows [row, row_end) of a block's z.
  void (*project)(const PackedMatrix& S, const TokenBlock& block, int64_t row, int64_t row_end);
  // y[block, row..row_end) from a packed block; at most kMaxRows rows, and row a multiple of kGroup;
  // a row takes 1 to kMaxWords tiles in one pass.
  void (*many)(const PackedMatrix& S, const TokenBlock& block, int64_t row, int64_t row_end, int words, const Output& y);
  // y[0..tokens, row..row_end) for 1 to kFewTokens tokens; add: to what y holds.
  void (*few)(const SparseMatrix& S, const float* x, int64_t tokens, int64_t row, int64_t row_end, const Output& y, bool add);
  // Arithmetic alone, fused multiply-adds on registers: returns the floating-point operations done.
  double (*fma)(int64_t rounds);
};

// Those that this processor runs, best first, ended by nullptr.
const Kernels* const* available_kernels();

// The best, or the one that the environment variable VITOATS_ISA names; nullptr if it names none that runs here.
const Kernels* choose_kernels();

// Runs call(context, i) for all i in [0, n), in any order, on any threads.
struct Parallel {
  virtual void run(void (*call)(void* context, size_t i), size_t n, void* context) const = 0;

 protected:
  ~Parallel() = default;
};

// S, U and V in the forms of both regimes.
class Weights {
 public:
  // S and the low-rank term point into memory that outlives this object.
  Weights(const SparseMatrix& S, const LowRank& low_rank);
  Weights(const Weights&) = delete;

  const SparseMatrix& S() const { return S_; }
  const SparseMatrix& U() const { return U_.matrix; }  // [rows, blocks rank], each row zero outside its block
  const SparseMatrix& V() const { return V_.matrix; }  // [blocks rank, columns]
  const PackedMatrix& packed() const { return packed_; }

 private:
  // A matrix that keeps the same number of columns in all rows of a block, from one block to the next.
  struct Banded {
    SparseMatrix matrix;
    std::vector<uint8_t> mask;
    std::vector<int64_t> row_start;
    Banded(int64_t rows, int64_t columns, int64_t blocks, int64_t width, const void* values, bool half);
  };

  SparseMatrix S_;
  Banded U_, V_;
  PackedMatrix packed_;
  std::vector<uint64_t> masks_;
  std::vector<uint16_t> values_;  // two of them for a float
  std::vector<int64_t> start_;
};

// y = x (S + U V)^T + bias. Returns false if memory for the transposed activations cannot be had.
bool multiply(const Kernels& kernels, const Weights& weights, const float* x, int64_t tokens, const Output& y,
              const Parallel& parallel);

}  // namespace vitoats
