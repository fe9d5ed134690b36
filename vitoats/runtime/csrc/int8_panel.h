// Panels of weights for the int8 kernels: two strips that are multiplied together.
#pragma once

#include "int8.h"
#include "simd.h"

namespace vitoats {
namespace {

constexpr int kPanelStrips = 2;
constexpr int kPanelRows = kPanelStrips * kStripRows;

VITOATS_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

VITOATS_INLINE uint64_t mask_at(const uint8_t* masks, int64_t quad) {
  uint64_t mask;
  std::memcpy(&mask, masks + 8 * quad, sizeof mask);
  return mask;
}

// Makes the strips of a panel ready, a few quads at a time: expands sparse ones into memory of our own, and fetches dense ones
// into the cache. Weights come from memory more slowly than AMX multiplies, so they are spread over the products of the panel
// before. An odd last strip stands for both.
template <class E>
class Panel {
 public:
  Panel() = default;
  Panel(const Int8Weights& weights, int64_t strip, int64_t second, int8_t* target) {
    const size_t strips[] = {static_cast<size_t>(strip), static_cast<size_t>(second)};
    quads_ = weights.sparse ? weights.S.quads : weights.dense.quads;
    const int64_t padded = divide_up(quads_, kStepQuads) * kStepQuads * kQuadBytes;
    for (int i = 0; i < kPanelStrips; ++i) {
      if (!weights.sparse) {
        strip_[i] = weights.dense.strip[strips[i]];
        continue;
      }
      strip_[i] = target_[i] = target + (second == strip ? 0 : i * padded);
      masks_[i] = weights.S.masks + 8 * static_cast<int64_t>(strips[i]) * quads_;
      values_[i] = weights.S.values[strips[i]];
    }
    if (weights.sparse && second + kPanelStrips < weights.strips)
      ahead_ = reinterpret_cast<intptr_t>(weights.S.values[strips[0] + kPanelStrips]) -
               reinterpret_cast<intptr_t>(weights.S.values[strips[0]]);
  }

  // The next n quads of both strips.
  VITOATS_NOINLINE void advance(int64_t n) {
    const int64_t begin = quad_, end = quad_ = smaller(quad_ + n, quads_);
    if (!target_[0]) {
      for (int64_t quad = begin; quad < end; ++quad)
        for (const int8_t* strip : strip_) __builtin_prefetch(strip + quad * kQuadBytes);
      return;
    }
    const int8_t *first = values_[0], *second = values_[1];
    const uint8_t *first_masks = masks_[0], *second_masks = masks_[1];
    int8_t *first_target = target_[0] + begin * kQuadBytes, *second_target = target_[1] + begin * kQuadBytes;
    const int64_t ahead = ahead_, masks_ahead = 8 * kPanelStrips * quads_;
    for (int64_t quad = begin; quad < end; ++quad) {
      const uint64_t mask = mask_at(first_masks, quad), second_mask = mask_at(second_masks, quad);
      __builtin_prefetch(first + ahead, 0, 2);  // the panel after this one
      __builtin_prefetch(second + ahead, 0, 2);
      if (quad % 8 == 0) {
        __builtin_prefetch(first_masks + 8 * quad + masks_ahead, 0, 2);
        __builtin_prefetch(second_masks + 8 * quad + masks_ahead, 0, 2);
      }
      E::store(first_target, E::expand(mask, first));
      E::store(second_target, E::expand(second_mask, second));
      first += __builtin_popcountll(mask);
      second += __builtin_popcountll(second_mask);
      first_target += kQuadBytes;
      second_target += kQuadBytes;
    }
    values_[0] = first;
    values_[1] = second;
  }

  // All that is left; zeros up to a whole step.
  void finish() {
    if (!target_[0]) return;
    advance(quads_);
    const int64_t padded = divide_up(quads_, kStepQuads) * kStepQuads;
    for (int8_t* target : target_) std::memset(target + quads_ * kQuadBytes, 0, static_cast<size_t>((padded - quads_) * kQuadBytes));
  }

  const int8_t* strip(int i) const { return strip_[i]; }

 private:
  int64_t quads_ = 0, quad_ = 0;
  int64_t ahead_ = 0;                   // bytes from the values of this panel to those of the next
  const int8_t* strip_[kPanelStrips] = {};
  int8_t* target_[kPanelStrips] = {};  // null for dense strips
  const uint8_t* masks_[kPanelStrips] = {};
  const int8_t* values_[kPanelStrips] = {};
};

}  // namespace
}  // namespace vitoats
