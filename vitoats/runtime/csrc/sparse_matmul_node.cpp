#include "sparse_matmul_node.h"

#include "sparse_matmul_constants.h"

namespace vitoats {

SparseMatMulNode::SparseMatMulNode(const ort::Api& api, const OrtKernelInfo* info)
    : SparseMatMulNode(api, checked_weights(api, info)) {}

SparseMatMulNode::SparseMatMulNode(const ort::Api& api, const Weights& weights)
    : Node(api), rows_(weights.S.rows), columns_(weights.S.columns), product_(weights, float_row(weights.type, checked_isa())) {}

void SparseMatMulNode::compute(OrtKernelContext* context) const {
  const Tensor x = float_input(context, 0, "x");
  Dimensions dimensions = x.dimensions();
  const int64_t tokens = checked_tokens(dimensions, columns_);

  size_t inputs = 0;
  const OrtValue* bias = nullptr;
  check(api().KernelContext_GetInputCount(context, &inputs));
  if (inputs > 3) check(api().KernelContext_GetInput(context, 3, &bias));
  Output y{};
  if (bias) y.bias = checked_bias(Tensor(api(), bias), rows_);

  dimensions.back() = rows_;
  y.data = output(context, dimensions);
  product_.run(x.data<const float>(), tokens, y, Pool(api(), context));
}

}  // namespace vitoats
