// Finds the rows of the kernel table that this processor supports, and chooses one.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace vitoats {

extern const Kernels kAvx512Float32, kAvx512Float16, kAvx2Float32, kAvx2Float16, kNeonFloat32, kNeonFloat16, kPortableFloat32,
    kPortableFloat16;

namespace {

struct Available {
  const Kernels* list[7] = {};

  Available() {
    int n = 0;
    const auto add = [&](const Kernels& kernels) { list[n++] = &kernels; };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) add(kAvx512Float32), add(kAvx512Float16);
    if (avx2) add(kAvx2Float32), add(kAvx2Float16);
#elif defined(__aarch64__)
    add(kNeonFloat32), add(kNeonFloat16);
#endif
    add(kPortableFloat32), add(kPortableFloat16);
  }
};

}  // namespace

const Kernels* const* available_kernels() {
  static const Available available;
  return available.list;
}

const Kernels* choose_kernels(ValueType type) {
  const char* wanted = std::getenv("VITOATS_ISA");
  for (const Kernels* const* k = available_kernels(); *k; ++k)
    if ((*k)->value_type == type && (!wanted || !*wanted || !std::strcmp(wanted, (*k)->isa))) return *k;
  return nullptr;
}

}  // namespace vitoats
