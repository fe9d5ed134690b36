// From the sums of an int8 product to outputs: scales, bias, activation, residual.
#pragma once

#include "gelu.h"
#include "int8_panel.h"

namespace vitoats {
namespace {

// Tokens that a kernel multiplies at a time.
template <class E>
constexpr int kBlock = E::kTokens > kDotTokens ? E::kTokens : kDotTokens;

// Sums of a block for two strips, [kBlock, kPanelRows].
template <class E>
struct alignas(64) BlockSums {
  int32_t S[kBlock<E> * kPanelRows], U[kBlock<E> * kPanelRows];
};

// The outputs of a block, in one of the types of activations, from its sums: scales, bias, activation, residual. Tokens are finished a few at a
// time. The flags say what there is to do.
template <class E, class Number, bool with_gelu, bool with_z, bool with_residual>
class Finish {
 public:
  Finish() = default;
  Finish(const Int8Weights& w, const Int8Tokens& tokens, const Int8Output& output, int64_t strip, int64_t second, int64_t token,
         int64_t count, const BlockSums<E>& sums)
      : count_(count),
        width_(smaller(w.rows - strip * kStripRows, (second - strip + 1) * kStripRows)),
        rows_(w.rows),
        parts_(w.parts),
        next_part_(w.part_of(second) - w.part_of(strip)),
        constants_{w.S_sum.data(), w.scale.data(), w.bias.data(), w.U_sum.data(), w.U_scale.data()},
        scale_(tokens.quantized.scale + token),
        zero_(tokens.quantized.zero + token),
        z_scale_(tokens.quantized_z.scale + token * w.parts + w.part_of(strip)),
        z_zero_(tokens.quantized_z.zero + token * w.parts + w.part_of(strip)),
        S_(sums.S),
        U_(sums.U),
        y_(outputs(output, static_cast<Number*>(nullptr)) + token * w.rows + strip * kStripRows),
        residual_(with_residual ? output.residual + token * w.rows + strip * kStripRows : nullptr) {
    for (const float*& constant : constants_)
      if (constant) constant += strip * kStripRows;
  }

  int64_t tokens_left() const { return count_ - done_; }

  // One counter says how far it is: pointers that were kept up to date in memory would have to travel through it at each call.
  VITOATS_INLINE void advance(int64_t n) {
    const int64_t first = done_;
    done_ = smaller(first + n, count_);
    if (first == done_) return;
    if (width_ == kPanelRows) {
      finish<kPanelRows>(first, done_, y_ + first * rows_, rows_, with_residual ? residual_ + first * rows_ : nullptr);
    } else {
      finish_part(first, done_);
    }
  }

 private:
  using V = typename E::V;
  static float* outputs(const Int8Output& output, float*) { return output.y; }
  static Float16* outputs(const Int8Output& output, Float16*) { return output.y_float16; }
  static BFloat16* outputs(const Int8Output& output, BFloat16*) { return output.y_bfloat16; }
  enum Constant { kS_sum, kScale, kBias, kU_sum, kU_scale };

  // The first rows outputs of tokens [first, end) of the block, one vector of outputs after the other, whose constants stay in
  // registers.
  template <int rows>
  VITOATS_NOINLINE void finish(int64_t first, int64_t end, Number* y, int64_t stride, const float* residual) const {
    for (int j = 0; j < rows; j += V::lanes) {
      const int64_t part = j < kStripRows ? 0 : next_part_;
      finish_vector(first, end, j, z_scale_ + part, z_zero_ + part, y + j, stride, with_residual ? residual + j : nullptr);
    }
  }

  VITOATS_INLINE void finish_vector(int64_t first, int64_t end, int j, const float* z_scales, const float* z_zeros, Number* y,
                                    int64_t stride, const float* residual) const {
    const auto S_sum = V::loadu(constants_[kS_sum] + j), S_scale = V::loadu(constants_[kScale] + j);
    const auto bias = V::loadu(constants_[kBias] + j);
    const auto U_sum = with_z ? V::loadu(constants_[kU_sum] + j) : bias, U_scale = with_z ? V::loadu(constants_[kU_scale] + j) : bias;
    const float *scales = scale_, *zeros = zero_;
    const int32_t *S = S_ + j, *U = U_ + j;
    const int64_t parts = parts_;
    for (int64_t t = first; t < end; ++t) {
      auto sum = V::fnmadd(V::set1(zeros[t]), S_sum, V::from_int(S + t * kPanelRows));
      sum = V::fmadd(V::mul(sum, S_scale), V::set1(scales[t]), bias);
      if constexpr (with_z) {
        const auto of_z = V::fnmadd(V::set1(z_zeros[t * parts]), U_sum, V::from_int(U + t * kPanelRows));
        sum = V::fmadd(V::mul(of_z, U_scale), V::set1(z_scales[t * parts]), sum);
      }
      if constexpr (with_gelu) sum = gelu<V>(sum);
      if constexpr (with_residual) {
        sum = V::add(sum, V::loadu(residual));
        residual += stride;
      }
      V::storeu(y, sum);
      y += stride;
    }
  }

  // The last outputs, where they are no whole panel. The constants are padded to whole strips.
  VITOATS_NOINLINE void finish_part(int64_t first, int64_t end) const {
    Number padded[kBlock<E> * kPanelRows];
    float residual[kBlock<E> * kPanelRows] = {};
    const auto width = static_cast<size_t>(width_);
    for (int64_t t = first; t < end && with_residual; ++t)
      std::memcpy(residual + (t - first) * kPanelRows, residual_ + t * rows_, width * sizeof(float));
    if (width_ > kStripRows) {
      finish<kPanelRows>(first, end, padded, kPanelRows, residual);
    } else {
      finish<kStripRows>(first, end, padded, kPanelRows, residual);
    }
    for (int64_t t = first; t < end; ++t) std::memcpy(y_ + t * rows_, padded + (t - first) * kPanelRows, width * sizeof(Number));
  }

  int64_t count_ = 0, done_ = 0;                // tokens
  int64_t width_ = 0, rows_ = 0;                // outputs of the panel, and of a token
  int64_t parts_ = 0, next_part_ = 0;           // next_part_: whether the second strip belongs to the next part
  const float* constants_[5] = {};
  const float *scale_ = nullptr, *zero_ = nullptr, *z_scale_ = nullptr, *z_zero_ = nullptr;
  const int32_t *S_ = nullptr, *U_ = nullptr;
  Number* y_ = nullptr;
  const float* residual_ = nullptr;
};

}  // namespace
}  // namespace vitoats
