#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include "x86.h"
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace vitoats {

#if defined(__x86_64__)
bool amx_available();  // in a file of its own, compiled for AMX
#endif

namespace {

struct Supported {
  const char* list[8] = {};

  Supported() {
    int n = 0;
    const auto add = [&](bool supported, const char* isa) {
      if (supported) list[n++] = isa;
    };
#if defined(__x86_64__)
    add(has_avx512_vnni() && amx_available(), "amx");
    add(has_avx512_vnni(), "avx512_vnni");
    add(has_avx512(), "avx512");
    add(has_avx_vnni(), "avx_vnni");
    add(has_avx2(), "avx2");
#elif defined(__aarch64__)
#if defined(__linux__)
    const bool dotprod = getauxval(AT_HWCAP) >> 20 & 1, i8mm = getauxval(AT_HWCAP2) >> 13 & 1;
    add(dotprod && i8mm, "neon_i8mm");
    add(dotprod, "neon_dotprod");
#endif
    add(true, "neon");
#endif
    add(true, "portable");
  }
};

}  // namespace

const char* const* supported_isas() {
  static const Supported supported;
  return supported.list;
}

const char* chosen_isa() {
  const char* wanted = std::getenv("VITOATS_ISA");
  if (!wanted || !*wanted) return supported_isas()[0];
  for (const char* const* isa = supported_isas(); *isa; ++isa)
    if (!std::strcmp(*isa, wanted)) return *isa;
  return nullptr;
}

}  // namespace vitoats
