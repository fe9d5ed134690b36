// The kernel tables, with the rows that are compiled for this architecture.
#include "attention_kernels.h"
#include "int8.h"
#include "isa.h"
#include "kernels.h"

#if defined(__x86_64__)
#include "x86.h"
#endif

namespace vitoats {

#if defined(__x86_64__)
extern const Kernels kAvx512Float32, kAvx512Float16, kAvx2Float32, kAvx2Float16;
extern const Int8Kernels kInt8Amx, kInt8Avx512Vnni, kInt8AvxVnni, kInt8Avx2;
extern const AttentionKernels kAttentionAmx, kAttentionBf16, kAttentionAvx512, kAttentionAvx2;
#elif defined(__aarch64__)
extern const Kernels kNeonFloat32, kNeonFloat16;
extern const Int8Kernels kInt8NeonI8mm, kInt8NeonDotprod, kInt8Neon;
extern const AttentionKernels kAttentionNeon;
#endif
extern const Kernels kPortableFloat32, kPortableFloat16;
extern const Int8Kernels kInt8Portable;
extern const AttentionKernels kAttentionPortable;

namespace {

constexpr const Kernels* kFloat[] = {
#if defined(__x86_64__)
    &kAvx512Float32, &kAvx512Float16, &kAvx2Float32, &kAvx2Float16,
#elif defined(__aarch64__)
    &kNeonFloat32, &kNeonFloat16,
#endif
    &kPortableFloat32, &kPortableFloat16, nullptr};

constexpr const Int8Kernels* kInt8[] = {
#if defined(__x86_64__)
    &kInt8Amx, &kInt8Avx512Vnni, &kInt8AvxVnni, &kInt8Avx2,
#elif defined(__aarch64__)
    &kInt8NeonI8mm, &kInt8NeonDotprod, &kInt8Neon,
#endif
    &kInt8Portable, nullptr};

constexpr const AttentionKernels* kAttention[] = {
#if defined(__x86_64__)
    &kAttentionAmx, &kAttentionBf16, &kAttentionAvx512, &kAttentionAvx2,
#elif defined(__aarch64__)
    &kAttentionNeon,
#endif
    &kAttentionPortable, nullptr};

// AVX512-BF16 is no part of the instruction set avx512_vnni. On Intel's processors it has half the speed of float32.
bool fast_bf16() {
#if defined(__x86_64__)
  return has_avx512_bf16() && !is_intel();
#else
  return false;
#endif
}

}  // namespace

const Kernels& float_row(ValueType type, const char* isa) {
  return *best_row(kFloat, isa, [type](const Kernels& row) { return row.value_type == type; });
}

const Int8Kernels& int8_row(const char* isa) {
  return *best_row(kInt8, isa, [](const Int8Kernels&) { return true; });
}

const AttentionKernels& attention_row(bool bfloat16, const char* isa) {
  return *best_row(kAttention, isa, [&](const AttentionKernels& row) {
    return !row.bfloat16 || (bfloat16 && (std::strcmp(row.isa, "avx512_vnni") || fast_bf16()));
  });
}

}  // namespace vitoats
