// The int8 product of one node, for all instruction sets: its weights, its quantized tokens, and the kernel table.
//
//   y = activation(x (S + U V)^T + bias) + residual, where x may be normalized (LayerNorm) first.
//
// S, U and V are int8 with a scale for each row. Each token of x, and of z = x V^T for each part, is quantized to uint8 with its
// own scale and zero point (quantize.h). The sums of products are exact in int32, so all kernels compute the same sums.
//
// A strip is 16 outputs, a quad 4 inputs. Weights are stored in strips, and a strip quad by quad, 16 outputs of 4 inputs each:
// what AMX and the dot products of all other instruction sets read. A sparse strip is expanded once for all tokens of a product.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "activations.h"

namespace vitoats {

constexpr int kStripRows = 16;
constexpr int kQuad = 4;
constexpr int kQuadBytes = kStripRows * kQuad;
constexpr int kStepQuads = 16;              // quads in a step of AMX; kernels may read a strip up to a whole step
constexpr int64_t kMaxInt8Columns = 65536;  // the sums of products of more inputs might overflow
constexpr int kDotTokens = 8;               // up to this many tokens a sparse strip is multiplied while it is expanded

// Dense strips. Each can be read up to a whole step of quads; what follows its own quads is multiplied by zeros only.
struct DenseStrips {
  int64_t quads = 0;
  std::vector<const int8_t*> strip;  // [quads, 16, 4] each
};

// Sparse strips: the values that the bits of the masks keep, in the order of the bits.
struct SparseStrips {
  int64_t quads = 0;
  const uint8_t* masks = nullptr;    // [strips, quads, 8], each 64 bits, least significant bit first
  std::vector<const int8_t*> values; // of each strip; 64 bytes can be read past the last one
};

enum class Activation { kNone, kGelu };

struct LayerNorm {
  const float* weight = nullptr;     // [columns]; null without a normalization
  const float* bias = nullptr;
  float epsilon = 0;
};

// The weights as the kernels read them. Vectors for outputs are padded to whole strips.
struct Int8Weights {
  int64_t rows, columns, strips;
  bool sparse;
  DenseStrips dense;                 // one of both is the matrix S
  SparseStrips S;
  std::vector<float> scale, bias, S_sum;          // [strips * 16]; sums of the rows of S
  int64_t parts = 1, rank = 0, rank_strips = 0;   // rank 0: no low-rank term
  DenseStrips U, V;                               // U [strips], V [parts * rank_strips]
  std::vector<float> U_scale, U_sum;              // [strips * 16]
  std::vector<float> V_scale, V_sum;              // [parts * rank_strips * 16]
  LayerNorm norm;
  Activation activation = Activation::kNone;
  std::vector<std::vector<int8_t>> copies;        // of strips that could not be read to a whole step in the model's own memory

  int64_t part_of(int64_t of_strip) const { return of_strip * parts / strips; }
  int64_t z_stride() const { return rank_strips * kStripRows; }  // numbers of z of one part
};

// Rows of numbers, quantized: v ~ scale (q - zero). Bytes past the end of a row are zero up to the stride. A row with an
// infinity or NaN has a NaN as its scale.
struct QuantizedRows {
  uint8_t* q;
  int64_t stride;   // bytes from row to row
  float* scale;
  float* zero;
};

// The tokens of a product. Those of z have a row for each token and part.
struct Int8Tokens {
  int64_t count;
  Activations x;           // [count, columns]; float32, or float16 if they are not normalized
  QuantizedRows quantized;
  float* z;                // [count, parts * z_stride]
  QuantizedRows quantized_z;
};

// Outputs [count, rows] in one of the types; the other pointers are null. The results of GELU may be float16, where larger numbers
// become the largest one, and other results bfloat16; these have no residual.
struct Int8Output {
  float* y = nullptr;
  const float* residual = nullptr;  // or null
  Float16* y_float16 = nullptr;
  BFloat16* y_bfloat16 = nullptr;

  explicit Int8Output(float* of_y, const float* of_residual = nullptr) : y(of_y), residual(of_residual) {}
  explicit Int8Output(Float16* of_y) : y_float16(of_y) {}
  explicit Int8Output(BFloat16* of_y) : y_bfloat16(of_y) {}

  // From the n-th number on.
  Int8Output from(int64_t n) const {
    if (y) return Int8Output(y + n, residual ? residual + n : nullptr);
    return y_float16 ? Int8Output(y_float16 + n) : Int8Output(y_bfloat16 + n);
  }
};

// A row of the kernel table.
struct Int8Kernels {
  const char* isa;

  // Normalizes and quantizes tokens [token, token_end) of x. normalized has room for a row.
  void (*quantize)(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end, float* normalized);
  // z = x V^T for strips [strip, strip_end) of V and tokens [token, token_end), a range that begins at a multiple of 32.
  void (*project)(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end, int64_t strip,
                  int64_t strip_end);
  // Quantizes z of tokens [token, token_end).
  void (*quantize_z)(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end);
  // y for strips [strip, strip_end) and all tokens. expanded has room for expanded_bytes(weights).
  void (*multiply)(const Int8Weights& weights, const Int8Tokens& tokens, int64_t strip, int64_t strip_end, const Int8Output& output,
                   int8_t* expanded);
};

// The bytes of two panels of two expanded strips each, in whole steps.
inline int64_t expanded_bytes(const Int8Weights& weights) {
  const int64_t steps = ((weights.columns + kQuad - 1) / kQuad + kStepQuads - 1) / kStepQuads;
  return 4 * steps * kStepQuads * kQuadBytes;
}

// The best row for an instruction set that this processor supports (isa.h).
const Int8Kernels& int8_row(const char* isa);

}  // namespace vitoats
