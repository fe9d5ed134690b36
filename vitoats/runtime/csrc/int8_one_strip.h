// The block product of engines with few registers: one strip at a time, so that twice as many tokens share its weights.
//
// Beyond what int8_kernels.h asks for, an engine E has:
//
//   kRegisterTokens            tokens whose sums for one strip stay in registers; kTokens may be a multiple of it
//   start(w, quads)            the Sums of all tokens before the first step over a strip
//   step(s, x, w)              like dot, for sums that began with start
#pragma once

#include "int8_kernels.h"

namespace vitoats {
namespace {

template <class E>
struct OneStripProduct {
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
  static void strip(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w, int64_t quads, int32_t* sums) {
    const auto start = E::start(w, quads);
    for (int64_t t = 0; t < count; t += E::kRegisterTokens)
      of_count<E::kRegisterTokens>(smaller(E::kRegisterTokens, count - t), start, x + t * stride, stride, w, quads,
                                   sums + t * kPanelRows);
  }

  template <int tokens, class... Arguments>
  static VITOATS_INLINE void of_count(int64_t count, Arguments... arguments) {
    if constexpr (tokens > 0) {
      if (count == tokens)
        of_tokens<tokens>(arguments...);
      else
        of_count<tokens - 1>(count, arguments...);
    }
  }

  template <int tokens>
  static VITOATS_NOINLINE void of_tokens(typename E::Sums start, const uint8_t* x, int64_t stride, const int8_t* w, int64_t quads,
                                         int32_t* sums) {
    typename E::Sums s[tokens];
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) s[t] = start;
    for (int64_t quad = 0; quad < quads; ++quad, x += kQuad, w += kQuadBytes) {
      const auto weights = E::load(w);
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) s[t] = E::step(s[t], x + t * stride, weights);
    }
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) E::store_sums(sums + t * kPanelRows, s[t]);
  }
};

}  // namespace
}  // namespace vitoats
