// One SparseMatMul node of a session; ONNX Runtime calls it a kernel.
#pragma once

#include "product.h"
#include "status.h"
#include "weights.h"

namespace vitoats {

// The kernels for a type of weights (all instruction sets support the default); throws Error if VITOATS_ISA is invalid.
const Kernels& chosen_kernels(ValueType type = ValueType::kFloat32);

class Node {
 public:
  Node(const ort::Api& api, const OrtKernelInfo* info);

  const ort::Api& api() const { return api_; }
  void compute(OrtKernelContext* context) const;

 private:
  Node(const ort::Api& api, const Weights& weights);

  const ort::Api& api_;
  int64_t rows_, columns_;
  Product product_;
};

}  // namespace vitoats
