#include "mlp_node.h"

#include <algorithm>

#include "int8_constants.h"

namespace vitoats {
namespace {

constexpr int64_t kHiddenBytes = 2 << 20;  // of hidden activations at a time

using Weights = std::shared_ptr<const Int8Weights>;

Weights first_weights(const NodeInputs& inputs, const MlpForm& form) {
  check_count(inputs, form.second.residual());
  return prepare_int8(checked_int8_constants(inputs, form.first));
}

Weights second_weights(const NodeInputs& inputs, const MlpForm& form) {
  return prepare_int8(checked_int8_constants(inputs, form.second, "hidden_features"));
}

}  // namespace

MlpNode::MlpNode(const ort::Api& api, const OrtKernelInfo* info, const MlpForm& form)
    : MlpNode(api, first_weights(NodeInputs(api, info), form), second_weights(NodeInputs(api, info), form)) {}

MlpNode::MlpNode(const ort::Api& api, const Weights& first, const Weights& second)
    : Node(api),
      columns_(first->columns),
      hidden_(first->rows),
      first_(first, int8_row(checked_isa())),
      second_(second, int8_row(checked_isa())),
      scratch_(ScratchPool::shared()) {
  if (second->columns != hidden_)
    refuse("hidden_features is " + std::to_string(second->columns) + ", but the first product has " + std::to_string(hidden_) +
           " outputs");
  if (second->rows != columns_)
    refuse("the second product has " + std::to_string(second->rows) + " outputs, and x has " + std::to_string(columns_));
}

void MlpNode::compute(OrtKernelContext* context) const {
  const Tensor x = float_input(context, 0, "x");
  const int64_t tokens = checked_tokens(x.dimensions(), columns_);
  const auto* from = x.data<const float>();
  float* y = output(context, x.dimensions());
  if (tokens == 0) return;
  const int64_t bytes_of_token = hidden_ * static_cast<int64_t>(sizeof(Float16));
  const int64_t chunks = (tokens * bytes_of_token + kHiddenBytes - 1) / kHiddenBytes, of_chunk = (tokens + chunks - 1) / chunks;
  const Scratch scratch(*scratch_, static_cast<size_t>(of_chunk * bytes_of_token));
  auto* hidden = reinterpret_cast<Float16*>(scratch.data());
  const Pool pool(api(), context);
  for (int64_t first = 0; first < tokens; first += of_chunk) {
    const int64_t count = std::min(of_chunk, tokens - first), at = first * columns_;
    first_.run(from + at, count, Int8Output(hidden), pool);
    second_.run(hidden, count, Int8Output(y + at, from + at), pool);
  }
}

}  // namespace vitoats
