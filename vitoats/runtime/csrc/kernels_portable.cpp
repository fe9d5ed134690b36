#include "float_kernels.h"
#include "vector_portable.h"
#include "vector_product.h"

namespace vitoats {

extern const Kernels kPortableFloat32 = float_kernels<Vector, float>("portable", ValueType::kFloat32);
extern const Kernels kPortableFloat16 = float_kernels<Vector, uint16_t>("portable", ValueType::kFloat16);
extern const AttentionKernels kAttentionPortable = attention::kernels<attention::Float32<Vector>>("portable");

}  // namespace vitoats
