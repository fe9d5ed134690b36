// The attention of a block, between its linear layers:
//
//   QKVAttention(qkv[batch, tokens, 3 num_heads width]) -> y[batch, tokens, num_heads width]
//
// y = softmax(scale q k^T) v for each head. Columns of qkv are [3, num_heads, width]: q, k and v. Attributes: num_heads; scale;
// bfloat16, 0 or 1: whether the products may be done in bfloat16.
#pragma once

#include "attention.h"
#include "node.h"

namespace vitoats {

class NodeInputs;

// The kernels that the attribute bfloat16 allows.
const AttentionKernels& checked_attention_kernels(const NodeInputs& inputs);

class AttentionNode : public Node {
 public:
  AttentionNode(const ort::Api& api, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const override;

 private:
  AttentionNode(const ort::Api& api, const NodeInputs& inputs);

  int64_t heads_;
  Attention attention_;
};

}  // namespace vitoats
