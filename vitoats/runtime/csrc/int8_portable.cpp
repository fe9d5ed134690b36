// Plain C++, for processors without kernels of their own.
#include "half.h"
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
  static T loadu(const Float16* p) { return from_float16(*p); }
  static void storeu(Float16* p, T v) { *p = to_float16(v); }
  static void storeu(BFloat16* p, T v) { *p = to_bfloat16(v); }
  static T set1(float f) { return f; }
  static T fmadd(T a, T b, T c) { return a * b + c; }
  static T fnmadd(T a, T b, T c) { return c - a * b; }
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
  static constexpr int kTokens = 32;

  static Weights load(const int8_t* p) {
    Weights w;
    std::memcpy(w.bytes, p, sizeof w.bytes);
    return w;
  }
  static void store(int8_t* p, const Weights& w) { std::memcpy(p, w.bytes, sizeof w.bytes); }
  static Weights expand(uint64_t mask, const int8_t* values) {
    Weights w;
    for (int i = 0; i < kQuadBytes; ++i) {
      const int kept = mask >> i & 1;
      w.bytes[i] = static_cast<int8_t>(*values & -kept);
      values += kept;
    }
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

// Weights and tokens are widened to 16 bits, some inputs at a time, and each output's weights put in a row: compilers turn sums
// of products of 16-bit integers into vector instructions.
template <>
class BlockProduct<Portable> {
 public:
  static int64_t steps(int64_t) { return 2; }
  void finish() {}

  template <class SideWork>
  void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
           SideWork&& side_work) {
    side_work();
    side_work();
    for (int64_t t = 0; t < count; ++t) std::memset(sums + t * kPanelRows, 0, kPanelRows * sizeof(int32_t));
    for (int64_t quad = 0; quad < quads; quad += kSomeQuads) {
      const int64_t n = smaller(kSomeQuads, quads - quad);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t k = 0; k < n * kQuad; ++k) numbers_[t][k] = x[t * stride + quad * kQuad + k];
      strip(count, w0 + quad * kQuadBytes, n, sums);
      if (w1 != w0) strip(count, w1 + quad * kQuadBytes, n, sums + kStripRows);
    }
  }

 private:
  static constexpr int kSomeQuads = 64, kRows = 4;

  void strip(int64_t count, const int8_t* w, int64_t quads, int32_t* sums) {
    for (int64_t quad = 0; quad < quads; ++quad)
      for (int j = 0; j < kStripRows; ++j)
        for (int i = 0; i < kQuad; ++i) weights_[j][quad * kQuad + i] = w[quad * kQuadBytes + j * kQuad + i];
    for (int64_t t = 0; t < count; ++t)
      for (int j = 0; j < kStripRows; j += kRows) add_rows(numbers_[t], weights_ + j, quads * kQuad, sums + t * kPanelRows + j);
  }

  // The products of a token with some outputs.
  static void add_rows(const int16_t* x, const int16_t (*w)[kSomeQuads * kQuad], int64_t n, int32_t* sums) {
    int32_t s[kRows] = {};
    for (int64_t k = 0; k < n; ++k) {
      s[0] += x[k] * w[0][k];
      s[1] += x[k] * w[1][k];
      s[2] += x[k] * w[2][k];
      s[3] += x[k] * w[3][k];
    }
    for (int j = 0; j < kRows; ++j) sums[j] += s[j];
  }

  alignas(64) int16_t numbers_[Portable::kTokens][kSomeQuads * kQuad], weights_[kStripRows][kSomeQuads * kQuad];
};

}  // namespace

extern const Int8Kernels kInt8Portable = int8_kernels<Portable>("portable");

}  // namespace vitoats
