// What stands before and behind an int8 product of a node, and where its inputs are.
#pragma once

#include <cstddef>
#include <string>

namespace vitoats {

struct Int8Form {
  bool layer_norm, sparse, gelu, add;
  size_t skipped = 0;  // inputs between x and this product's own, which are those of another product

  std::string name() const {
    return std::string(layer_norm ? "LayerNorm" : "") + (sparse ? "SparseMatMulInt8" : "MatMulInt8") + (gelu ? "Gelu" : add ? "Add" : "");
  }
  size_t first_weight() const { return skipped + (layer_norm ? 3 : 1); }
  size_t scale() const { return first_weight() + (sparse ? 2 : 1); }
  size_t bias() const { return scale() + 1; }
  size_t residual() const { return bias() + (sparse ? 5 : 1); }  // the first input behind the weights
};

}  // namespace vitoats
