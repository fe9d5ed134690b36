#include "float_kernels.h"
#include "vector_avx512.h"
#include "vector_product.h"

namespace vitoats {

extern const Kernels kAvx512Float32 = float_kernels<Vector, float>("avx512", ValueType::kFloat32);
extern const Kernels kAvx512Float16 = float_kernels<Vector, uint16_t>("avx512", ValueType::kFloat16);
extern const AttentionKernels kAttentionAvx512 = attention::kernels<attention::Float32<Vector>>("avx512");

}  // namespace vitoats
