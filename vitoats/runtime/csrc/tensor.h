// A tensor of ONNX Runtime: its type, dimensions and data.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "status.h"

namespace vitoats {

using Dimensions = std::vector<int64_t>;

class Tensor {
 public:
  Tensor(const ort::Api& api, const OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api.GetTensorTypeAndShape(value, &info));
    OrtStatus* status = api.GetTensorElementType(info, &type_);
    size_t count = 0;
    if (!status) status = api.GetDimensionsCount(info, &count);
    if (!status) {
      dimensions_.resize(count);
      status = api.GetDimensions(info, dimensions_.data(), count);
    }
    api.ReleaseTensorTypeAndShapeInfo(info);
    check(status);
    check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data_));
  }

  int type() const { return type_; }
  const Dimensions& dimensions() const { return dimensions_; }

  template <class Element>
  Element* data() const {
    return static_cast<Element*>(data_);
  }

 private:
  int type_ = 0;
  Dimensions dimensions_;
  void* data_ = nullptr;
};

// The number of elements in the dimensions from begin to end. An empty tensor may have dimensions whose product overflows.
inline int64_t elements(Dimensions::const_iterator begin, Dimensions::const_iterator end) {
  int64_t n = 1;
  for (auto d = begin; d != end; ++d)
    if (*d == 0) return 0;
  for (auto d = begin; d != end; ++d) n *= *d;
  return n;
}

inline std::string text(const Dimensions& dimensions) {
  std::string found = "[";
  for (const int64_t d : dimensions) found += (found.size() > 1 ? ", " : "") + std::to_string(d);
  return found + "]";
}

}  // namespace vitoats
