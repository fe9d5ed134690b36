// NEON with products of matrices: an instruction multiplies 2 tokens x 8 inputs by 8 inputs x 2 outputs, unsigned by signed bytes.
// Two quads make 8 inputs: the 4 bytes of an output in one are put next to those in the other.
#include "int8_neon.h"

namespace vitoats {
namespace {

struct NeonI8mm : NeonEngine {
  static constexpr int kTokens = 6;

  static VITOATS_INLINE Sums dot(Sums s, const uint8_t* x, Weights w) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) s.of[i] = vusdotq_s32(s.of[i], broadcast(x), w.of[i]);
    return s;
  }
};

// Of an odd number of tokens, the last one is a pair with itself.
template <>
class BlockProduct<NeonI8mm> {
 public:
  static int64_t steps(int64_t) { return 2; }
  void finish() {}

  template <class SideWork>
  void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
           SideWork&& side_work) {
    side_work();
    side_work();
    strip(x, stride, count, w0, quads, sums);
    if (w1 != w0) strip(x, stride, count, w1, quads, sums + kStripRows);
  }

 private:
  static constexpr int kPairs = kStripRows / 2;  // of outputs

  static void strip(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w, int64_t quads, int32_t* sums) {
    if (count > 4)
      of_pairs<3>(x, stride, count, w, quads, sums);
    else if (count > 2)
      of_pairs<2>(x, stride, count, w, quads, sums);
    else
      of_pairs<1>(x, stride, count, w, quads, sums);
  }

  template <int pairs>
  static VITOATS_NOINLINE void of_pairs(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w, int64_t quads, int32_t* sums) {
    int32x4_t s[pairs][kPairs];  // [2 tokens, 2 outputs] each
#pragma GCC unroll 3
    for (int t = 0; t < pairs; ++t)
#pragma GCC unroll 8
      for (int i = 0; i < kPairs; ++i) s[t][i] = vdupq_n_s32(0);
    const int64_t last = (count - 1) * stride;
    int64_t quad = 0;
    for (; quad + 2 <= quads; quad += 2) {
      uint8x16_t tokens[pairs];
#pragma GCC unroll 3
      for (int t = 0; t < pairs; ++t) {
        const uint8_t* first = x + 2 * t * stride + quad * kQuad;
        tokens[t] = vcombine_u8(vld1_u8(first), vld1_u8(t + 1 < pairs ? first + stride : x + last + quad * kQuad));
      }
      multiply(s, tokens, w + quad * kQuadBytes, kQuadBytes);
    }
    if (quad < quads) {
      uint8x16_t tokens[pairs];
#pragma GCC unroll 3
      for (int t = 0; t < pairs; ++t) {
        const uint8_t* first = x + 2 * t * stride + quad * kQuad;
        tokens[t] = vcombine_u8(quad_and_zeros(first), quad_and_zeros(t + 1 < pairs ? first + stride : x + last + quad * kQuad));
      }
      multiply(s, tokens, w + quad * kQuadBytes, 0);  // the inputs of a second quad are zero
    }
#pragma GCC unroll 3
    for (int t = 0; t < pairs; ++t) {
      int32_t* target = sums + 2 * t * kPanelRows;
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; i += 2) {
        const int64x2_t a = vreinterpretq_s64_s32(s[t][i]), b = vreinterpretq_s64_s32(s[t][i + 1]);
        vst1q_s32(target + 2 * i, vreinterpretq_s32_s64(vzip1q_s64(a, b)));
        if (2 * t + 1 < count) vst1q_s32(target + kPanelRows + 2 * i, vreinterpretq_s32_s64(vzip2q_s64(a, b)));
      }
    }
  }

  // Adds the products with the quad at w and the one at w + second.
  template <int pairs>
  static VITOATS_INLINE void multiply(int32x4_t (&s)[pairs][kPairs], const uint8x16_t (&tokens)[pairs], const int8_t* w, int64_t second) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(w + 16 * i)), b = vreinterpretq_s32_s8(vld1q_s8(w + second + 16 * i));
      const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(a, b)), high = vreinterpretq_s8_s32(vzip2q_s32(a, b));
#pragma GCC unroll 3
      for (int t = 0; t < pairs; ++t) {
        s[t][2 * i] = vusmmlaq_s32(s[t][2 * i], tokens[t], low);
        s[t][2 * i + 1] = vusmmlaq_s32(s[t][2 * i + 1], tokens[t], high);
      }
    }
  }

  static VITOATS_INLINE uint8x8_t quad_and_zeros(const uint8_t* x) {
    uint32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    return vreinterpret_u8_u32(vset_lane_u32(bytes, vdup_n_u32(0), 0));
  }
};

}  // namespace

extern const Int8Kernels kInt8NeonI8mm = int8_kernels<NeonI8mm>("neon_i8mm");

}  // namespace vitoats
