// The attention of a block from its LayerNorm on:
//
//   LayerNorm...QKVAttention(x[batch, tokens, K], norm_weight, norm_bias, weights of qkv) -> y[batch, tokens, num_heads width]
//
// which is QKVAttention (attention_node.h) of the product (int8_node.h). qkv never leaves the node: it is kept for as many images
// at a time as stay in the second-level cache, and in bfloat16 if that is what attention multiplies.
#pragma once

#include "attention.h"
#include "int8_form.h"
#include "int8_product.h"
#include "node.h"

namespace vitoats {

class NodeInputs;

struct BlockAttentionForm {
  Int8Form qkv;

  explicit BlockAttentionForm(bool sparse) : qkv{true, sparse, false, false} {}
  std::string name() const { return qkv.name() + "QKVAttention"; }
};

class BlockAttentionNode : public Node {
 public:
  BlockAttentionNode(const ort::Api& api, const OrtKernelInfo* info, const BlockAttentionForm& form);
  void compute(OrtKernelContext* context) const override;

 private:
  BlockAttentionNode(const ort::Api& api, const NodeInputs& inputs, const std::shared_ptr<const Int8Weights>& weights);

  template <class Number>
  void compute(const float* x, int64_t batch, int64_t tokens, float* y, const Parallel& parallel) const;

  int64_t columns_, rows_, heads_;
  Int8Product product_;
  Attention attention_;
  std::shared_ptr<ScratchPool> scratch_;
};

}  // namespace vitoats
