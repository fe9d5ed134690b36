// A node of a session; ONNX Runtime calls it a kernel.
#pragma once

#include "parallel.h"
#include "status.h"
#include "tensor.h"

namespace vitoats {

class Node {
 public:
  explicit Node(const ort::Api& api) : api_(api) {}
  Node(const Node&) = delete;
  virtual ~Node() = default;

  const ort::Api& api() const { return api_; }
  virtual void compute(OrtKernelContext* context) const = 0;

 protected:
  // An input of floats.
  Tensor float_input(OrtKernelContext* context, size_t input, const char* name) const;
  // Its data; allocated by ONNX Runtime.
  float* output(OrtKernelContext* context, const Dimensions& dimensions) const;

 private:
  const ort::Api& api_;
};

// Runs tasks on ONNX Runtime's own threads.
struct Pool : Parallel {
  const ort::Api& api;
  OrtKernelContext* context;

  Pool(const ort::Api& a, OrtKernelContext* c) : api(a), context(c) {}
  void run(void (*call)(void*, size_t), size_t n, void* work) const override;
};

// The number of tokens in x, whose last dimension must be columns.
int64_t checked_tokens(const Dimensions& x, int64_t columns);

// VITOATS_ISA or the best instruction set; throws Error if the variable names none that this processor has.
const char* checked_isa();

}  // namespace vitoats
