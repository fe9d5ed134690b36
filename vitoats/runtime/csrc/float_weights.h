// Weights as the float kernels read them. SpMM reads a copy of S in the order in which it passes, since strided reads from
// memory cost more than the product; SpMV reads the model's own S. U and V stay as they are: they have no zeros to skip.
//
// The copy takes the bytes of S's values, and 8 bytes for each row and strip of 64 columns: for 64 columns or more about as
// much as S itself, and never more than that and 17 bytes a row, the output of five tokens.
#pragma once

#include "kernels.h"

namespace vitoats {

struct FloatWeights {
  Weights model;
  int64_t strips, groups;
  const uint64_t* masks;        // [strips, rows]
  const void* values;           // by strips, then by rows
  const int64_t* group_start;   // [strips, groups], where a group's values begin
  const int64_t* row_start;     // [rows + 1], where a row's values begin in the model's own
};

std::shared_ptr<const void> pack_float_weights(const Weights& weights);

}  // namespace vitoats
