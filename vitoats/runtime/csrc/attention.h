// Attention y = softmax(scale q k^T) v of all heads, independent of ONNX Runtime: qkv [batch, tokens, 3, heads, width] and
// y [batch, tokens, heads, width], float32. With kernels that multiply in bfloat16, qkv may be bfloat16.
//
// Special numbers are treated the same way by all kernels:
//   * a query with an infinity or NaN has NaN in all its outputs of that head, and so has a query whose scores overflow, as in
//     the same formula of standard operators.
//   * keys or values of a head with an infinity or NaN in them make all its outputs NaN. (Standard operators give weight zero to
//     a key whose score is -infinity, and leave infinities in the output.)
//   * subnormal numbers count as zero.
#pragma once

#include <cstdint>
#include <memory>

#include "attention_kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace vitoats {

class Attention {
 public:
  Attention(int64_t heads, float scale, const AttentionKernels& kernels)
      : kernels_(kernels), heads_(heads), scale_(scale), scratch_(ScratchPool::shared()) {}

  bool bfloat16() const { return kernels_.bfloat16; }

  // Throws std::bad_alloc and anything that parallel throws. The result does not depend on the number of threads.
  void run(const Activations& qkv, int64_t batch, int64_t tokens, int64_t width, float* y, const Parallel& parallel) const;

 private:
  const AttentionKernels& kernels_;
  int64_t heads_;
  float scale_;
  std::shared_ptr<ScratchPool> scratch_;
};

}  // namespace vitoats
