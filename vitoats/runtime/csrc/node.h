// One SparseMatMul node of a session: what ONNX Runtime calls its kernel.
#pragma once

#include "product.h"
#include "status.h"
#include "weights.h"

namespace vitoats {

// Those for weights of a type, or of the type that all instruction sets have; refuses a wrong VITOATS_ISA.
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
