// What an x86-64 processor has, and what the system lets programs use. GCC and Clang have built-ins for this, which do not know the
// same names.
#pragma once

#include <cpuid.h>

#include <cstdint>

namespace vitoats {
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// All zero for a leaf that the processor does not have.
inline Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers found;
  __get_cpuid_count(leaf, subleaf, &found.a, &found.b, &found.c, &found.d);
  return found;
}

constexpr bool all_set(uint64_t bits, uint64_t wanted) { return (bits & wanted) == wanted; }

// Register states that the system saves at a switch of tasks, as bits of XCR0.
constexpr uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;

inline uint64_t saved_states() {
  constexpr unsigned kOsxsave = 1u << 27;
  if (!all_set(cpuid(1).c, kOsxsave)) return 0;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

inline bool has_avx2() {  // with the smaller sets that came with it
  constexpr unsigned kFma = 1u << 12, kPopcnt = 1u << 23, kAvx = 1u << 28, kF16c = 1u << 29;  // leaf 1, c
  constexpr unsigned kBmi = 1u << 3, kAvx2 = 1u << 5, kBmi2 = 1u << 8;                         // leaf 7, b
  return all_set(saved_states(), kAvxState) && all_set(cpuid(1).c, kFma | kPopcnt | kAvx | kF16c) &&
         all_set(cpuid(7).b, kBmi | kAvx2 | kBmi2);
}

inline bool has_avx_vnni() {
  constexpr unsigned kAvxVnni = 1u << 4;
  return has_avx2() && all_set(cpuid(7, 1).a, kAvxVnni);
}

inline bool has_avx512() {
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;  // leaf 7, b
  return has_avx2() && all_set(saved_states(), kAvx512State) && all_set(cpuid(7).b, kF | kDq | kBw | kVl);
}

inline bool has_avx512_vnni() {
  constexpr unsigned kVbmi = 1u << 1, kVbmi2 = 1u << 6, kVnni = 1u << 11;  // leaf 7, c
  return has_avx512() && all_set(cpuid(7).c, kVbmi | kVbmi2 | kVnni);
}

inline bool has_avx512_bf16() {
  constexpr unsigned kBf16 = 1u << 5;
  return has_avx512() && all_set(cpuid(7, 1).a, kBf16);
}

inline bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;  // leaf 7, d
  return all_set(saved_states(), kTileState) && all_set(cpuid(7).d, kBf16 | kTile | kInt8);
}

inline bool is_intel() {
  constexpr unsigned kGenu = 0x756e6547;  // the first letters of GenuineIntel
  return cpuid(0).b == kGenu;
}

}  // namespace
}  // namespace vitoats
