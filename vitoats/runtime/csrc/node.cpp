#include "node.h"

#include "constants.h"

namespace vitoats {
namespace {

// Runs tasks on ONNX Runtime's own threads.
struct Pool : Parallel {
  const ort::Api& api;
  OrtKernelContext* context;

  Pool(const ort::Api& a, OrtKernelContext* c) : api(a), context(c) {}

  void run(void (*call)(void*, size_t), size_t n, void* work) const override {
    if (n == 1) return call(work, 0);
    check(api.KernelContext_ParallelFor(context, call, n, n, work));
  }
};

}  // namespace

const Kernels& chosen_kernels(ValueType type) {
  if (const Kernels* kernels = choose_kernels(type)) return *kernels;
  std::string names;
  for (const Kernels* const* k = available_kernels(); *k; ++k)
    if ((*k)->value_type == type) names += std::string(names.empty() ? "" : ", ") + (*k)->isa;
  refuse("VITOATS_ISA names no instruction set that this processor has: set it to one of " + names);
}

Node::Node(const ort::Api& api, const OrtKernelInfo* info) : Node(api, checked_weights(api, info)) {}

Node::Node(const ort::Api& api, const Weights& weights)
    : api_(api), rows_(weights.S.rows), columns_(weights.S.columns), product_(weights, chosen_kernels(weights.type)) {}

void Node::compute(OrtKernelContext* context) const {
  const OrtValue *x_value = nullptr, *bias = nullptr;
  check(api_.KernelContext_GetInput(context, 0, &x_value));
  const Tensor x(api_, x_value);
  Dimensions dimensions = x.dimensions();
  if (x.type() != ort::kFloat) refuse("x is not float");
  if (dimensions.empty() || dimensions.back() != columns_)
    refuse("x has shape " + text(dimensions) + ", its last dimension is not in_features = " + std::to_string(columns_));
  const int64_t tokens = elements(dimensions.begin(), dimensions.end() - 1);

  size_t inputs = 0;
  check(api_.KernelContext_GetInputCount(context, &inputs));
  if (inputs > 3) check(api_.KernelContext_GetInput(context, 3, &bias));
  Output output{};
  if (bias) output.bias = checked_bias(Tensor(api_, bias), rows_);

  dimensions.back() = rows_;
  OrtValue* y = nullptr;
  check(api_.KernelContext_GetOutput(context, 0, dimensions.data(), dimensions.size(), &y));
  output.data = Tensor(api_, y).data<float>();
  product_.run(x.data<const float>(), tokens, output, Pool(api_, context));
}

}  // namespace vitoats
