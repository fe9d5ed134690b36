#include "block_attention_node.h"

#include <algorithm>

#include "attention_node.h"
#include "int8_constants.h"

namespace vitoats {
namespace {

constexpr int64_t kQkvBytes = 2 << 20;  // of qkv at a time

std::shared_ptr<const Int8Weights> qkv_weights(const NodeInputs& inputs, const BlockAttentionForm& form) {
  check_count(inputs, form.qkv.residual());
  return prepare_int8(checked_int8_constants(inputs, form.qkv));
}

}  // namespace

BlockAttentionNode::BlockAttentionNode(const ort::Api& api, const OrtKernelInfo* info, const BlockAttentionForm& form)
    : BlockAttentionNode(api, NodeInputs(api, info), qkv_weights(NodeInputs(api, info), form)) {}

BlockAttentionNode::BlockAttentionNode(const ort::Api& api, const NodeInputs& inputs,
                                       const std::shared_ptr<const Int8Weights>& weights)
    : Node(api),
      columns_(weights->columns),
      rows_(weights->rows),
      heads_(inputs.integer("num_heads")),
      product_(weights, int8_row(checked_isa())),
      attention_(heads_, inputs.number("scale"), checked_attention_kernels(inputs)),
      scratch_(ScratchPool::shared()) {
  if (rows_ % 3 || rows_ / 3 % heads_)
    refuse("the product has " + std::to_string(rows_) + " outputs, not 3 num_heads width with num_heads = " + std::to_string(heads_));
}

void BlockAttentionNode::compute(OrtKernelContext* context) const {
  const Tensor x = float_input(context, 0, "x");
  Dimensions dimensions = x.dimensions();
  if (dimensions.size() != 3) refuse("x has shape " + text(dimensions) + ", not [batch, tokens, in_features]");
  checked_tokens(dimensions, columns_);
  const int64_t batch = dimensions[0], tokens = dimensions[1];
  dimensions[2] = rows_ / 3;
  float* y = output(context, dimensions);
  if (batch == 0 || tokens == 0) return;
  const Pool pool(api(), context);
  if (attention_.bfloat16()) {
    compute<BFloat16>(x.data<const float>(), batch, tokens, y, pool);
  } else {
    compute<float>(x.data<const float>(), batch, tokens, y, pool);
  }
}

template <class Number>
void BlockAttentionNode::compute(const float* x, int64_t batch, int64_t tokens, float* y, const Parallel& parallel) const {
  const int64_t bytes_of_image = tokens * rows_ * static_cast<int64_t>(sizeof(Number));
  const int64_t at_once = std::clamp<int64_t>(kQkvBytes / bytes_of_image, 1, batch);
  const Scratch scratch(*scratch_, static_cast<size_t>(at_once * bytes_of_image));
  auto* qkv = reinterpret_cast<Number*>(scratch.data());
  for (int64_t first = 0; first < batch; first += at_once) {
    const int64_t count = std::min(at_once, batch - first);
    product_.run(x + first * tokens * columns_, count * tokens, Int8Output(qkv), parallel);
    attention_.run(qkv, count, tokens, rows_ / 3 / heads_, y + first * tokens * (rows_ / 3), parallel);
  }
}

}  // namespace vitoats
