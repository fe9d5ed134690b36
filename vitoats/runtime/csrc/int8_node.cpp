#include "int8_node.h"

#include "int8_constants.h"

namespace vitoats {
namespace {

Int8Constants constants(const NodeInputs& inputs, const Int8Form& form) {
  check_count(inputs, form.residual() + (form.add ? 1 : 0));
  return checked_int8_constants(inputs, form);
}

}  // namespace

Int8Node::Int8Node(const ort::Api& api, const OrtKernelInfo* info, const Int8Form& form)
    : Node(api),
      form_(form),
      weights_(prepare_int8(constants(NodeInputs(api, info), form))),
      product_(weights_, int8_row(checked_isa())) {}

void Int8Node::compute(OrtKernelContext* context) const {
  const Tensor x = float_input(context, 0, "x");
  Dimensions dimensions = x.dimensions();
  const int64_t tokens = checked_tokens(dimensions, weights_->columns);
  dimensions.back() = weights_->rows;
  const float* added = nullptr;
  if (form_.add) {
    const Tensor residual = float_input(context, form_.residual(), "residual");
    if (residual.dimensions() != dimensions)
      refuse("residual has shape " + text(residual.dimensions()) + ", not " + text(dimensions));
    added = residual.data<const float>();
  }
  float* y = output(context, dimensions);
  product_.run(x.data<const float>(), tokens, Int8Output(y, added), Pool(api(), context));
}

}  // namespace vitoats
