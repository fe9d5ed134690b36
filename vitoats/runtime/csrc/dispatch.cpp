// Which kernels run here, and which of them is used.
#include <cstdlib>
#include <cstring>

#include "sparse_matmul.h"

namespace vitoats {

extern const Kernels kAvx512, kAvx2, kNeon, kPortable;

namespace {

struct Available {
  const Kernels* list[5] = {};

  Available() {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      list[n++] = &kAvx512;
    if (avx2) list[n++] = &kAvx2;
#elif defined(__aarch64__)
    list[n++] = &kNeon;
#endif
    list[n++] = &kPortable;
  }
};

}  // namespace

const Kernels* const* available_kernels() {
  static const Available available;
  return available.list;
}

const Kernels* choose_kernels() {
  const char* wanted = std::getenv("VITOATS_ISA");
  for (const Kernels* const* k = available_kernels(); *k; ++k)
    if (!wanted || !*wanted || !std::strcmp(wanted, (*k)->name)) return *k;
  return nullptr;
}

}  // namespace vitoats
