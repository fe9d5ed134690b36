// The MLP of a block, with LayerNorm and residual sum:
//
//   LayerNorm...Gelu...Add(x[..., K], norm_weight, norm_bias, weights of the first product, weights of the second) -> y[..., K]
//
//   y = x + W2 gelu(W1 layer_norm(x) + bias1) + bias2
//
// with the weights of int8_node.h and the attributes in_features = K, hidden_features and epsilon. Hidden activations never leave
// the node: they are kept in float16, for as many tokens at a time as stay in the second-level cache.
#pragma once

#include "int8_form.h"
#include "int8_product.h"
#include "node.h"

namespace vitoats {

struct MlpForm {
  Int8Form first, second;

  MlpForm(bool first_sparse, bool second_sparse)
      : first{true, first_sparse, true, false}, second{false, second_sparse, false, true, first.residual() - 1} {}
  std::string name() const { return first.name() + second.name(); }
};

class MlpNode : public Node {
 public:
  MlpNode(const ort::Api& api, const OrtKernelInfo* info, const MlpForm& form);
  void compute(OrtKernelContext* context) const override;

 private:
  using Weights = std::shared_ptr<const Int8Weights>;
  MlpNode(const ort::Api& api, const Weights& first, const Weights& second);

  int64_t columns_, hidden_;
  Int8Product first_, second_;
  std::shared_ptr<ScratchPool> scratch_;
};

}  // namespace vitoats
