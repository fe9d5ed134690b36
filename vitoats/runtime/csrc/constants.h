// The constants of a node, checked: whatever a model file says of them that cannot be is refused when the session is made.
#pragma once

#include "tensor.h"
#include "weights.h"

namespace vitoats {

// Values, mask, U and V, which stay where ONNX Runtime has them. Throws what is wrong; a bias that is a constant is checked too.
Weights checked_weights(const ort::Api& api, const OrtKernelInfo* info);

// The bias, whose type and shape must be right.
const float* checked_bias(const Tensor& bias, int64_t rows);

}  // namespace vitoats
