#include "node.h"

#include "isa.h"

namespace vitoats {

Tensor Node::float_input(OrtKernelContext* context, size_t input, const char* name) const {
  const OrtValue* value = nullptr;
  check(api_.KernelContext_GetInput(context, input, &value));
  Tensor tensor(api_, value);
  if (tensor.type() != ort::kFloat) refuse(std::string(name) + " is not float");
  return tensor;
}

float* Node::output(OrtKernelContext* context, const Dimensions& dimensions) const {
  OrtValue* value = nullptr;
  check(api_.KernelContext_GetOutput(context, 0, dimensions.data(), dimensions.size(), &value));
  return Tensor(api_, value).data<float>();
}

void Pool::run(void (*call)(void*, size_t), size_t n, void* work) const {
  if (n == 1) return call(work, 0);
  check(api.KernelContext_ParallelFor(context, call, n, n, work));
}

int64_t checked_tokens(const Dimensions& x, int64_t columns) {
  if (x.empty() || x.back() != columns)
    refuse("x has shape " + text(x) + ", its last dimension is not in_features = " + std::to_string(columns));
  return elements(x.begin(), x.end() - 1);
}

const char* checked_isa() {
  if (const char* isa = chosen_isa()) return isa;
  std::string names;
  for (const char* const* isa = supported_isas(); *isa; ++isa) names += std::string(names.empty() ? "" : ", ") + *isa;
  refuse("VITOATS_ISA names no instruction set that this processor has: set it to one of " + names);
}

}  // namespace vitoats
