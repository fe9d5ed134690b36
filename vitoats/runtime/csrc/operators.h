// The operators of the domain vitoats.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "node.h"

namespace vitoats {

struct OperatorKind {
  std::string name;
  int since_version;                 // of the domain
  std::vector<int> input_types;
  size_t required;                   // the first inputs; the others may be left out
  bool linear_layer = true;
  std::function<std::unique_ptr<Node>(const ort::Api& api, const OrtKernelInfo* info)> create;
  // The last dimension of y, from the inputs' shapes; its other dimensions are those of the first input. An empty vector, or one
  // with -1, stands for an unknown shape. Returns -1 if it cannot tell.
  std::function<int64_t(const std::vector<Dimensions>& inputs)> last_dimension;
};

constexpr int kDomainVersion = 3;

const std::vector<OperatorKind>& operators();

}  // namespace vitoats
