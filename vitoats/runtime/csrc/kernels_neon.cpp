#include "float_kernels.h"
#include "vector_neon.h"
#include "vector_product.h"

namespace vitoats {

extern const Kernels kNeonFloat32 = float_kernels<Vector, float>("neon", ValueType::kFloat32);
extern const Kernels kNeonFloat16 = float_kernels<Vector, uint16_t>("neon", ValueType::kFloat16);
extern const AttentionKernels kAttentionNeon = attention::kernels<attention::Float32<Vector>>("neon");

}  // namespace vitoats
