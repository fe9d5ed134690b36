// Attention with products in bfloat16 by AVX512-BF16.
#include "bfloat16.h"
#include "vector_product.h"

namespace vitoats {
namespace {

struct Avx512Bf16 : attention::VectorProduct<Avx512Bf16, Vector> {
  using V = Vector;
  static constexpr int kSteps = 2, kDegree = 3;
  static VITOATS_INLINE __m512 pack(__m512 first, __m512 second) { return bfloat16::pack(first, second); }
  static VITOATS_INLINE __m512 interleave(__m512 first, __m512 second) { return bfloat16::interleave(first, second); }
  static VITOATS_INLINE __m512 multiply_add(__m512 step, __m512 vector, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(step), reinterpret_cast<__m512bh>(vector));
  }
};

}  // namespace

extern const AttentionKernels kAttentionBf16 = attention::kernels<Avx512Bf16>("avx512_vnni");

}  // namespace vitoats
