// The kernel tables, with the rows that are compiled for this architecture.
#include "int8.h"
#include "isa.h"
#include "kernels.h"

namespace vitoats {

#if defined(__x86_64__)
extern const Kernels kAvx512Float32, kAvx512Float16, kAvx2Float32, kAvx2Float16;
extern const Int8Kernels kInt8Amx, kInt8Avx512Vnni, kInt8AvxVnni, kInt8Avx2;
#elif defined(__aarch64__)
extern const Kernels kNeonFloat32, kNeonFloat16;
extern const Int8Kernels kInt8NeonI8mm, kInt8NeonDotprod, kInt8Neon;
#endif
extern const Kernels kPortableFloat32, kPortableFloat16;
extern const Int8Kernels kInt8Portable;

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

}  // namespace

const Kernels& float_row(ValueType type, const char* isa) {
  return *best_row(kFloat, isa, [type](const Kernels& row) { return row.value_type == type; });
}

const Int8Kernels& int8_row(const char* isa) {
  return *best_row(kInt8, isa, [](const Int8Kernels&) { return true; });
}

}  // namespace vitoats
