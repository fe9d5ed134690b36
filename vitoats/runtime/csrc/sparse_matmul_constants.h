// Checks the constants of a node: anything invalid in the model file is refused when the session is created.
#pragma once

#include "tensor.h"
#include "weights.h"

namespace vitoats {

// Checks values, mask, U, V and a constant bias. The result points to ONNX Runtime's memory. Throws if anything is invalid.
Weights checked_weights(const ort::Api& api, const OrtKernelInfo* info);

// Checks the type and shape of the bias; returns its data.
const float* checked_bias(const Tensor& bias, int64_t rows);

}  // namespace vitoats
