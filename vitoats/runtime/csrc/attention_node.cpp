#include "attention_node.h"

#include "node_inputs.h"

namespace vitoats {

const AttentionKernels& checked_attention_kernels(const NodeInputs& inputs) {
  const int64_t bfloat16 = inputs.integer("bfloat16", 0);
  if (bfloat16 > 1) refuse("bfloat16 is " + std::to_string(bfloat16) + ", not 0 or 1");
  return attention_row(bfloat16, checked_isa());
}

AttentionNode::AttentionNode(const ort::Api& api, const OrtKernelInfo* info) : AttentionNode(api, NodeInputs(api, info)) {}

AttentionNode::AttentionNode(const ort::Api& api, const NodeInputs& inputs)
    : Node(api), heads_(inputs.integer("num_heads")), attention_(heads_, inputs.number("scale"), checked_attention_kernels(inputs)) {}

void AttentionNode::compute(OrtKernelContext* context) const {
  const Tensor qkv = float_input(context, 0, "qkv");
  Dimensions dimensions = qkv.dimensions();
  if (dimensions.size() != 3 || dimensions[2] % 3 || dimensions[2] / 3 % heads_)
    refuse("qkv has shape " + text(dimensions) + ", not [batch, tokens, 3 num_heads width] with num_heads = " + std::to_string(heads_));
  dimensions[2] /= 3;
  float* y = output(context, dimensions);
  attention_.run(qkv.data<const float>(), dimensions[0], dimensions[1], dimensions[2] / heads_, y, Pool(api(), context));
}

}  // namespace vitoats
