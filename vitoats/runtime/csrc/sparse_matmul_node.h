// SparseMatMul(x[..., K], values[nnz], mask[N, ceil(K/8)] uint8, bias[N], U[B, N/B, r], V[B, r, K]) -> y[..., N]
//
// y = x (S + U V)^T + bias, attribute in_features = K, with U V [B, N/B, K] reshaped to [N, K]. bias is optional; U and V are
// optional together. The constants in a model file are checked when the session is created; x and a bias that is not a constant
// are checked at each call.
#pragma once

#include "node.h"
#include "product.h"

namespace vitoats {

class SparseMatMulNode : public Node {
 public:
  SparseMatMulNode(const ort::Api& api, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const override;

 private:
  SparseMatMulNode(const ort::Api& api, const Weights& weights);

  int64_t rows_, columns_;
  Product product_;
};

}  // namespace vitoats
