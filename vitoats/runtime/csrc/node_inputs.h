// The inputs and attributes of a node in the model, for checks when the session is created.
#pragma once

#include "tensor.h"
#include "weights.h"

namespace vitoats {

class NodeInputs {
 public:
  NodeInputs(const ort::Api& api, const OrtKernelInfo* info) : api_(api), info_(info) {
    check(api.KernelInfo_GetInputCount(info, &count_));
  }

  size_t count() const { return count_; }

  int64_t integer(const char* attribute, int64_t least = 1) const {
    int64_t found = 0;
    if (OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, attribute, &found)) {
      api_.ReleaseStatus(status);
      refuse("the attribute " + std::string(attribute) + " (an integer) is missing");
    }
    if (found < least) refuse(std::string(attribute) + " is " + std::to_string(found) + ", not " + std::to_string(least) + " or more");
    return found;
  }

  // Finite.
  float number(const char* attribute) const {
    float found = 0;
    if (OrtStatus* status = api_.KernelInfoGetAttribute_float(info_, attribute, &found)) {
      api_.ReleaseStatus(status);
      refuse("the attribute " + std::string(attribute) + " (a number) is missing");
    }
    if (!all_finite(ValueType::kFloat32, &found, 1)) refuse(std::string(attribute) + " is infinite or NaN");
    return found;
  }

  // Null if the input is left out or not a constant.
  const OrtValue* find_constant(size_t input) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (input < count_) check(api_.KernelInfoGetConstantInput_tensor(info_, input, &is_constant, &value));
    return is_constant ? value : nullptr;
  }

  Tensor constant(size_t input, const char* name) const {
    const OrtValue* value = find_constant(input);
    if (!value) refuse(std::string(name) + " is not a constant of the model");
    return {api_, value};
  }

  Tensor tensor(const OrtValue* value) const { return {api_, value}; }

 private:
  const ort::Api& api_;
  const OrtKernelInfo* info_;
  size_t count_ = 0;
};

}  // namespace vitoats
