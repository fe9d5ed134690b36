// The constants of an int8 node, in the model's memory, and their preparation for the kernels. Weights are read where they lie;
// only what is needed for each output, and strips that end before a whole step, are copied.
#pragma once

#include <memory>

#include "int8.h"

namespace vitoats {

struct Int8Constants {
  int64_t rows, columns;
  const uint8_t* mask;         // [strips, quads, 8]; null for a dense matrix
  const int8_t* values;        // [n_values], or [strips, quads, 16, 4] of a dense matrix
  int64_t n_values;
  const float *scale, *bias;   // [rows]
  int64_t parts, rank;         // rank 0: no low-rank term
  const int8_t* U;             // [strips, ceil(rank / 4), 16, 4]
  const float* U_scale;        // [rows]
  const int8_t* V;             // [parts, ceil(rank / 16), quads, 16, 4]
  const float* V_scale;        // [parts, rank]
  LayerNorm norm;
  Activation activation;
};

// The constants must outlive the result, and must have been checked: the mask has n_values bits.
std::shared_ptr<const Int8Weights> prepare_int8(const Int8Constants& constants);

}  // namespace vitoats
