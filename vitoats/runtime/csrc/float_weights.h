// The weights as the float kernels read them. SpMM reads a copy of S that is stored in access order, since strided reads from
// memory cost more than the product. SpMV reads the model's own S. U and V are not copied: they have no zeros to skip.
//
// The copy takes the bytes of S's values, plus 8 bytes per row and strip of 64 columns. For 64 columns or more that is about
// the size of S itself, and never more than 17 bytes per row above it, less than the output of five tokens.
#pragma once

#include "kernels.h"

namespace vitoats {

struct FloatWeights {
  Weights model;
  int64_t strips, groups;
  const uint64_t* masks;        // [strips, rows]
  const void* values;           // by strips, then by rows
  const int64_t* group_start;   // [strips, groups], start of a group's values
  const int64_t* row_start;     // [rows + 1], start of a row's values in the model's own S
};

std::shared_ptr<const void> pack_float_weights(const Weights& weights);

}  // namespace vitoats
