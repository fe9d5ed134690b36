// Treats subnormal numbers as zero during the lifetime of an object: arithmetic on them is a hundred times slower on many
// processors. The destructor restores the thread's floating-point state, including its flags. Only x86-64 and AArch64 are
// supported; on other processors the class does nothing.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace vitoats {

class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero | kSubnormalsAreZero); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("mrs %0, fpsr" : "=r"(flags_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | kFlushToZero) : "memory");
  }
  ~FlushSubnormals() {
    asm volatile("msr fpcr, %0" ::"r"(saved_) : "memory");
    asm volatile("msr fpsr, %0" ::"r"(flags_) : "memory");
  }
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr unsigned kFlushToZero = 0x8000, kSubnormalsAreZero = 0x40;
  unsigned saved_;
#elif defined(__aarch64__)
  static constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
  uint64_t saved_, flags_;
#endif
};

}  // namespace vitoats
