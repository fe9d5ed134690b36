// Plain C++, for processors without kernels of their own.
#include "int8_kernels.h"

namespace vitoats {
namespace {

struct Scalar {
  static constexpr int lanes = 1;
  using T = float;
  static T zero() { return 0; }
  static T load(const float* p) { return *p; }
  static T loadu(const float* p) { return *p; }
  static void storeu(float* p, T v) { *p = v; }
  static T set1(float f) { return f; }
  static T fmadd(T a, T b, T c) { return __builtin_fmaf(a, b, c); }
  static T fnmadd(T a, T b, T c) { return __builtin_fmaf(-a, b, c); }
  static T add(T a, T b) { return a + b; }
  static T sub(T a, T b) { return a - b; }
  static T mul(T a, T b) { return a * b; }
  static T min(T a, T b) { return a < b ? a : b; }
  static T max(T a, T b) { return a > b ? a : b; }
  static int32_t set1_int(int32_t n) { return n; }
  static float sum(T v) { return v; }
  static float reduce_min(T v) { return v; }
  static float reduce_max(T v) { return v; }
  static T from_int(const int32_t* p) { return static_cast<float>(*p); }
  static void store_bytes(uint8_t* p, T v, int32_t n) {
    *p = static_cast<uint8_t>(smaller(static_cast<int32_t>(__builtin_nearbyintf(v)) + n, 255));
  }
};

struct Portable {
  using V = Scalar;
  struct Weights {
    int8_t bytes[kQuadBytes];
  };
  struct Sums {
    int32_t of[kStripRows];
  };
  struct Scope {
    Scope() {}
  };
  static constexpr int kTokens = 1;

  static Weights load(const int8_t* p) {
    Weights w;
    std::memcpy(w.bytes, p, sizeof w.bytes);
    return w;
  }
  static void store(int8_t* p, const Weights& w) { std::memcpy(p, w.bytes, sizeof w.bytes); }
  static Weights expand(uint64_t mask, const int8_t* values) {
    Weights w;
    for (int i = 0; i < kQuadBytes; ++i) w.bytes[i] = mask >> i & 1 ? *values++ : static_cast<int8_t>(0);
    return w;
  }
  static Sums zero() { return {}; }
  static Sums add(const Sums& a, const Sums& b) {
    Sums s;
    for (int j = 0; j < kStripRows; ++j) s.of[j] = a.of[j] + b.of[j];
    return s;
  }
  static Sums dot(Sums s, const uint8_t* x, const Weights& w) {
    for (int j = 0; j < kStripRows; ++j)
      for (int i = 0; i < kQuad; ++i) s.of[j] += x[i] * w.bytes[kQuad * j + i];
    return s;
  }
  static void store_sums(int32_t* p, const Sums& s) { std::memcpy(p, s.of, sizeof s.of); }
};

}  // namespace

extern const Int8Kernels kInt8Portable = int8_kernels<Portable>("portable");

}  // namespace vitoats
