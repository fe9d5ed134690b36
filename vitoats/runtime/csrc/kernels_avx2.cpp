#include "float_kernels.h"
#include "vector_avx2.h"
#include "vector_product.h"

namespace vitoats {

extern const Kernels kAvx2Float32 = float_kernels<Vector, float>("avx2", ValueType::kFloat32);
extern const Kernels kAvx2Float16 = float_kernels<Vector, uint16_t>("avx2", ValueType::kFloat16);
extern const AttentionKernels kAttentionAvx2 = attention::kernels<attention::Float32<Vector>>("avx2");

}  // namespace vitoats
