// The int8 operators, which differ in what stands before and behind the product:
//
//   SparseMatMulInt8(x[..., K], values[nnz], mask[s, q, 8], scale[N], bias[N], U[s, ceil(r/4), 16, 4], U_scale[N],
//                    V[B, ceil(r/16), q, 16, 4], V_scale[B, r]) -> y[..., N]
//   MatMulInt8(x[..., K], weight[s, q, 16, 4], scale[N], bias[N]) -> y[..., N]
//
// with s = ceil(N/16), q = ceil(K/4), and the attribute in_features = K. The name may begin with LayerNorm: norm_weight[K] and
// norm_bias[K] follow x, and there is an attribute epsilon. It may end in Gelu, or in Add: then residual[..., N] is the last input.
#pragma once

#include <string>

#include "int8_form.h"
#include "int8_product.h"
#include "node.h"

namespace vitoats {

class Int8Node : public Node {
 public:
  Int8Node(const ort::Api& api, const OrtKernelInfo* info, const Int8Form& form);
  void compute(OrtKernelContext* context) const override;

 private:
  Int8Form form_;
  std::shared_ptr<const Int8Weights> weights_;
  Int8Product product_;
};

}  // namespace vitoats
