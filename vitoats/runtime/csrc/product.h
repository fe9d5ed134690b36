// The product y = x (S + U V)^T + bias of one node, independent of ONNX Runtime: x [tokens, columns] and y [tokens, rows],
// float32, row-major.
//
// Special numbers are treated the same way by all kernels and for any number of tokens:
//   * a token with an infinity or NaN in x has NaN in all its outputs, and no effect on other tokens. (The dense product with
//     S + U V gives infinities or NaN there.)
//   * subnormal numbers count as zero: in x, in float32 weights, and in all intermediate results.
#pragma once

#include <cstdint>
#include <memory>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace vitoats {

class Product {
 public:
  // The memory that the weights point to must outlive this object.
  Product(const Weights& weights, const Kernels& kernels);

  // Throws std::bad_alloc and anything that parallel throws. The result does not depend on the number of threads.
  void run(const float* x, int64_t tokens, const Output& y, const Parallel& parallel) const;

 private:
  void spmm(const float* x, int64_t tokens, const Output& y, const Parallel& parallel) const;
  void spmv(const float* x, int64_t tokens, const Output& y, const Parallel& parallel) const;

  const Kernels& kernels_;
  int64_t rows_, columns_, z_rows_;
  std::shared_ptr<const void> weights_;  // as kernels_ packed them
  std::shared_ptr<ScratchPool> scratch_;
};

}  // namespace vitoats
