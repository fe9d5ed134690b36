// The int8 product of one node (int8.h), independent of ONNX Runtime.
#pragma once

#include <memory>

#include "int8.h"
#include "parallel.h"
#include "scratch.h"

namespace vitoats {

class Int8Product {
 public:
  Int8Product(std::shared_ptr<const Int8Weights> weights, const Int8Kernels& kernels);

  // x [tokens, columns], y and residual [tokens, rows]. Throws std::bad_alloc and anything that parallel throws. The result does
  // not depend on the number of threads.
  void run(const Activations& x, int64_t tokens, const Int8Output& output, const Parallel& parallel) const;

 private:
  // Quantizes x and z, for few tokens with a task for every range of V.
  void quantize_many(const Int8Tokens& tokens, const Parallel& parallel) const;
  void quantize_few(const Int8Tokens& tokens, const Parallel& parallel) const;

  std::shared_ptr<const Int8Weights> weights_;
  const Int8Kernels& kernels_;
  std::shared_ptr<ScratchPool> scratch_;
};

}  // namespace vitoats
