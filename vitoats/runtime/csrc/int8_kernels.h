// The int8 kernels, written once over an engine E, which an instruction set defines:
//
//   V                          a vector of floats (simd.h, quantize.h), which also has from_int(p): int32 lanes as floats,
//                              and fnmadd(a, b, c) = c - a b
//   Weights, Sums              64 bytes of a strip (16 outputs of 4 inputs), and 16 sums in int32
//   load(p), expand(mask, p)   Weights from memory; expand takes as many bytes as the mask has bits, and reads 64
//   store(p, w)                Weights to memory
//   zero(), dot(s, x, w)       Sums; dot adds the products with the 4 bytes at x
//   store_sums(p, s)           to int32 [16]
//   kTokens                    tokens of a block, whose sums for two strips stay in registers
//   Scope                      an object that lives as long as a task
//   product(...)               see BlockProduct below
//
// Two strips are a panel. A task expands a panel and passes over all tokens, a block at a time; the outputs of the block before
// are finished, and the next panel is expanded, in between the steps of a product. So AMX never waits for either.
#pragma once

#include "gelu.h"
#include "int8.h"
#include "quantize.h"

namespace vitoats {
namespace {

constexpr int kPanelStrips = 2;
constexpr int kPanelRows = kPanelStrips * kStripRows;
constexpr int kMaxBlock = 32;  // tokens

VITOATS_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

VITOATS_INLINE uint64_t mask_at(const uint8_t* masks, int64_t quad) {
  uint64_t mask;
  std::memcpy(&mask, masks + 8 * quad, sizeof mask);
  return mask;
}

// Sums of a block for two strips, [kMaxBlock, kPanelRows].
struct alignas(64) BlockSums {
  int32_t S[kMaxBlock * kPanelRows], U[kMaxBlock * kPanelRows];
};

// Nothing to do between the steps of a product.
struct NoSideWork {
  VITOATS_INLINE void operator()() const {}
};

// The product of engines whose dot works on registers: the sums of all tokens of a block for both strips.
template <class E, int tokens>
VITOATS_INLINE void product_of(const uint8_t* x, int64_t stride, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums) {
  typename E::Sums s[tokens][2];
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) s[t][0] = s[t][1] = E::zero();
  for (int64_t quad = 0; quad < quads; ++quad) {
    const auto a = E::load(w0 + quad * kQuadBytes), b = E::load(w1 + quad * kQuadBytes);
    const uint8_t* bytes = x + quad * kQuad;
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) {
      s[t][0] = E::dot(s[t][0], bytes + t * stride, a);
      s[t][1] = E::dot(s[t][1], bytes + t * stride, b);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) {
    E::store_sums(sums + t * kPanelRows, s[t][0]);
    E::store_sums(sums + t * kPanelRows + kStripRows, s[t][1]);
  }
}

template <class E, int tokens, class... Arguments>
VITOATS_INLINE void product_of_count(int64_t count, Arguments... arguments) {
  if constexpr (tokens > 0) {
    if (count == tokens)
      product_of<E, tokens>(arguments...);
    else
      product_of_count<E, tokens - 1>(count, arguments...);
  }
}

// The sums of up to kTokens tokens of x, for two strips, over all quads. They are in memory after finish(), or when the next
// product has done its first step, and not before that product begins.
template <class E>
struct BlockProduct {
  static int64_t steps(int64_t) { return 1; }
  void finish() {}

  template <class SideWork>
  void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
                  SideWork&& side_work) {
    side_work();
    product_of_count<E, E::kTokens>(count, x, stride, w0, w1, quads, sums);
  }
};

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

// The outputs of a block from its sums: scales, bias, activation, residual. Tokens are finished a few at a time. The flags say
// what there is to do.
template <class E, bool with_gelu, bool with_z, bool with_residual>
class Finish {
 public:
  Finish() = default;
  Finish(const Int8Weights& w, const Int8Tokens& tokens, const Int8Output& output, int64_t strip, int64_t second, int64_t token,
         int64_t count, const BlockSums& sums)
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
        y_(output.y + token * w.rows + strip * kStripRows),
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
  enum Constant { kS_sum, kScale, kBias, kU_sum, kU_scale };

  // The first rows outputs of tokens [t, end) of the block.
  template <int rows>
  VITOATS_NOINLINE void finish(int64_t t, int64_t end, float* y, int64_t stride, const float* residual) const {
    constexpr int vectors = rows / V::lanes, of_strip = kStripRows / V::lanes;
    const int32_t *S = S_ + t * kPanelRows, *U = U_ + t * kPanelRows;
    const float *scales = scale_, *zeros = zero_, *z_scale = z_scale_ + t * parts_, *z_zero = z_zero_ + t * parts_;
    const int64_t parts = parts_, next_part = next_part_;
    const float *S_sum = constants_[kS_sum], *S_scale = constants_[kScale], *bias = constants_[kBias], *U_sum = constants_[kU_sum],
                *U_scale = constants_[kU_scale];
    for (; t < end; ++t) {
      const auto scale = V::set1(scales[t]), zero = V::set1(zeros[t]);
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) {
        const int j = i * V::lanes;
        auto sum = V::fnmadd(zero, V::loadu(S_sum + j), V::from_int(S + j));
        sum = V::fmadd(V::mul(sum, V::loadu(S_scale + j)), scale, V::loadu(bias + j));
        if constexpr (with_z) {
          const int64_t part = i < of_strip ? 0 : next_part;
          const auto of_z = V::fnmadd(V::set1(z_zero[part]), V::loadu(U_sum + j), V::from_int(U + j));
          sum = V::fmadd(V::mul(of_z, V::loadu(U_scale + j)), V::set1(z_scale[part]), sum);
        }
        if constexpr (with_gelu) sum = gelu<V>(sum);
        if constexpr (with_residual) sum = V::add(sum, V::loadu(residual + j));
        V::storeu(y + j, sum);
      }
      S += kPanelRows;
      U += kPanelRows;
      z_scale += parts;
      z_zero += parts;
      y += stride;
      if constexpr (with_residual) residual += stride;
    }
  }

  // The last outputs, where they are no whole panel. The constants are padded to whole strips.
  VITOATS_NOINLINE void finish_part(int64_t first, int64_t end) const {
    float padded[kMaxBlock * kPanelRows], residual[kMaxBlock * kPanelRows] = {};
    const auto bytes = static_cast<size_t>(width_) * sizeof(float);
    for (int64_t t = first; t < end && with_residual; ++t)
      std::memcpy(residual + (t - first) * kPanelRows, residual_ + t * rows_, bytes);
    if (width_ > kStripRows) {
      finish<kPanelRows>(first, end, padded, kPanelRows, residual);
    } else {
      finish<kStripRows>(first, end, padded, kPanelRows, residual);
    }
    for (int64_t t = first; t < end; ++t) std::memcpy(y_ + t * rows_, padded + (t - first) * kPanelRows, bytes);
  }

  int64_t count_ = 0, done_ = 0;                // tokens
  int64_t width_ = 0, rows_ = 0;                // outputs of the panel, and of a token
  int64_t parts_ = 0, next_part_ = 0;           // next_part_: whether the second strip belongs to the next part
  const float* constants_[5] = {};
  const float *scale_ = nullptr, *zero_ = nullptr, *z_scale_ = nullptr, *z_zero_ = nullptr;
  const int32_t *S_ = nullptr, *U_ = nullptr;
  float* y_ = nullptr;
  const float* residual_ = nullptr;
};

// What a product does between its steps.
template <class E, class FinishOf>
struct SideWork {
  FinishOf& finish;
  Panel<E>& next;
  int64_t tokens, quads;  // at each call

  VITOATS_INLINE void operator()() const {
    finish.advance(tokens);
    next.advance(quads);
  }
};

template <class E>
struct Int8KernelsOf {
  using V = typename E::V;

  static void quantize(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end, float* normalized) {
    for (int64_t t = token; t < token_end; ++t) {
      const float* x = tokens.x + t * weights.columns;
      if (weights.norm.weight) {
        normalize_row<V>(x, weights.columns, weights.norm, normalized);
        x = normalized;
      }
      quantize_row<V>(x, weights.columns, tokens.quantized, t);
    }
  }

  static void quantize_z(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end) {
    for (int64_t row = token * weights.parts; row < token_end * weights.parts; ++row)
      quantize_row<V>(tokens.z + row * weights.z_stride(), weights.rank, tokens.quantized_z, row);
  }

  static void project(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end, int64_t strip,
                      int64_t strip_end) {
    const typename E::Scope scope;
    const DenseStrips& strips = weights.V;
    const int64_t width = weights.parts * weights.z_stride();
    BlockSums sums;
    BlockProduct<E> product;
    for (int64_t s = strip; s < strip_end; s += kPanelStrips) {
      const int64_t second = smaller(s + 1, strip_end - 1);
      for (int64_t t = token; t < token_end; t += E::kTokens) {
        const int64_t count = smaller(E::kTokens, token_end - t);
        product.run(tokens.quantized.q + t * tokens.quantized.stride, tokens.quantized.stride, count,
                    strips.strip[static_cast<size_t>(s)], strips.strip[static_cast<size_t>(second)], strips.quads, sums.S, NoSideWork());
        product.finish();
        for (int64_t i = 0; i < count; ++i) {
          const auto scale = V::set1(tokens.quantized.scale[t + i]), zero = V::set1(-tokens.quantized.zero[t + i]);
          for (int64_t j = 0; j < (second - s + 1) * kStripRows; j += V::lanes) {
            const int64_t at = s * kStripRows + j;
            const auto sum = V::fmadd(zero, V::loadu(weights.V_sum.data() + at), V::from_int(sums.S + i * kPanelRows + j));
            V::storeu(tokens.z + (t + i) * width + at, V::mul(V::mul(sum, V::loadu(weights.V_scale.data() + at)), scale));
          }
        }
      }
    }
  }

  static void multiply(const Int8Weights& weights, const Int8Tokens& tokens, int64_t strip, int64_t strip_end, const Int8Output& output,
                       int8_t* expanded) {
    using Run = void (*)(const Int8Weights&, const Int8Tokens&, int64_t, int64_t, const Int8Output&, int8_t*);
    constexpr Run runs[] = {multiply_to<Finish<E, false, false, false>>, multiply_to<Finish<E, false, false, true>>,
                            multiply_to<Finish<E, false, true, false>>,  multiply_to<Finish<E, false, true, true>>,
                            multiply_to<Finish<E, true, false, false>>,  multiply_to<Finish<E, true, false, true>>,
                            multiply_to<Finish<E, true, true, false>>,   multiply_to<Finish<E, true, true, true>>};
    const int index = (weights.activation == Activation::kGelu) * 4 + (weights.rank != 0) * 2 + (output.residual != nullptr);
    runs[index](weights, tokens, strip, strip_end, output, expanded);
  }

  template <class FinishOf>
  static void multiply_to(const Int8Weights& weights, const Int8Tokens& tokens, int64_t strip, int64_t strip_end,
                          const Int8Output& output, int8_t* expanded) {
    const typename E::Scope scope;
    if (weights.sparse && tokens.count <= kDotTokens) return multiply_few<FinishOf>(weights, tokens, strip, strip_end, output);
    const int64_t quads = weights.sparse ? weights.S.quads : weights.dense.quads, blocks = divide_up(tokens.count, E::kTokens);
    const int64_t steps = BlockProduct<E>::steps(quads), half = expanded_bytes(weights) / 2;
    const auto panel = [&](int64_t s, int i) {
      return s < strip_end ? Panel<E>(weights, s, smaller(s + 1, strip_end - 1), expanded + i * half) : Panel<E>();
    };
    BlockSums sums;
    BlockProduct<E> product;
    int side = 0;
    FinishOf finish;
    Panel<E> current = panel(strip, side);
    for (int64_t s = strip; s < strip_end; s += kPanelStrips) {
      const int64_t second = smaller(s + 1, strip_end - 1);
      current.finish();
      side ^= 1;
      Panel<E> next = panel(s + kPanelStrips, side);
      const int64_t part = weights.part_of(s), part_end = weights.part_of(second);
      for (int64_t t = 0; t < tokens.count; t += E::kTokens) {
        const int64_t count = smaller(E::kTokens, tokens.count - t);
        const SideWork<E, FinishOf> side_work{finish, next, divide_up(finish.tokens_left(), steps), divide_up(quads, steps * blocks)};
        product.run(tokens.quantized.q + t * tokens.quantized.stride, tokens.quantized.stride, count, current.strip(0),
                    current.strip(1), quads, sums.S, side_work);
        finish.advance(kMaxBlock);
        if (weights.rank) multiply_z(product, weights, tokens, s, second, part, part_end, t, count, sums.U);
        finish = FinishOf(weights, tokens, output, s, second, t, count, sums);
      }
      current = next;
    }
    product.finish();
    finish.advance(kMaxBlock);
  }

  // U z for two strips, which may belong to different parts.
  VITOATS_INLINE static void multiply_z(BlockProduct<E>& product, const Int8Weights& weights, const Int8Tokens& tokens, int64_t s,
                                        int64_t second, int64_t part, int64_t part_end, int64_t token, int64_t count,
                                        int32_t* sums) {
    const int64_t stride = tokens.quantized_z.stride;
    const auto multiply = [&](int64_t of_part, int64_t a, int64_t b, int32_t* target) {
      product.run(tokens.quantized_z.q + (token * weights.parts + of_part) * stride, stride * weights.parts, count,
                  weights.U.strip[static_cast<size_t>(a)], weights.U.strip[static_cast<size_t>(b)], weights.U.quads, target,
                  NoSideWork());
    };
    multiply(part, s, second, sums);
    if (part == part_end) return;
    int32_t of_second[kMaxBlock * kPanelRows];
    multiply(part_end, second, second, of_second);
    product.finish();
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(sums + i * kPanelRows + kStripRows, of_second + i * kPanelRows, kStripRows * sizeof(int32_t));
  }

  // Few tokens: the weights are multiplied as they are expanded, without a panel in memory.
  template <class FinishOf>
  static void multiply_few(const Int8Weights& weights, const Int8Tokens& tokens, int64_t strip, int64_t strip_end,
                           const Int8Output& output) {
    BlockSums sums;
    BlockProduct<E> product;
    for (int64_t s = strip; s < strip_end; ++s) {
      dot_count<kDotTokens>(tokens.count, weights.S.masks + 8 * s * weights.S.quads, weights.S.values[static_cast<size_t>(s)],
                            weights.S.quads, tokens.quantized.q, tokens.quantized.stride, sums.S);
      for (int64_t t = 0; weights.rank && t < tokens.count; t += E::kTokens)
        multiply_z(product, weights, tokens, s, s, weights.part_of(s), weights.part_of(s), t, smaller(E::kTokens, tokens.count - t),
                   sums.U + t * kPanelRows);
      product.finish();
      FinishOf(weights, tokens, output, s, s, 0, tokens.count, sums).advance(tokens.count);
    }
  }

  template <int tokens, class... Arguments>
  VITOATS_INLINE static void dot_count(int64_t count, Arguments... arguments) {
    if constexpr (tokens > 0) {
      if (count == tokens)
        dot<tokens>(arguments...);
      else
        dot_count<tokens - 1>(count, arguments...);
    }
  }

  // Two chains of sums where registers allow, since a dot takes longer than an expansion.
  template <int tokens>
  VITOATS_INLINE static void dot(const uint8_t* masks, const int8_t* values, int64_t quads, const uint8_t* x, int64_t stride, int32_t* sums) {
    constexpr int chains = tokens <= 2 ? 2 : 1;
    typename E::Sums s[chains][tokens];
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c)
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) s[c][t] = E::zero();
    int64_t quad = 0;
    for (; quad + chains <= quads; quad += chains)
#pragma GCC unroll 16
      for (int c = 0; c < chains; ++c) {
        const uint64_t mask = mask_at(masks, quad + c);
        const auto w = E::expand(mask, values);
        values += __builtin_popcountll(mask);
#pragma GCC unroll 16
        for (int t = 0; t < tokens; ++t) s[c][t] = E::dot(s[c][t], x + t * stride + (quad + c) * kQuad, w);
      }
    for (; quad < quads; ++quad) {
      const uint64_t mask = mask_at(masks, quad);
      const auto w = E::expand(mask, values);
      values += __builtin_popcountll(mask);
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) s[0][t] = E::dot(s[0][t], x + t * stride + quad * kQuad, w);
    }
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) {
      if constexpr (chains == 2) s[0][t] = E::add(s[0][t], s[1][t]);
      E::store_sums(sums + t * kPanelRows, s[0][t]);
    }
  }
};

template <class E>
constexpr Int8Kernels int8_kernels(const char* isa) {
  using Row = Int8KernelsOf<E>;
  return {isa, Row::quantize, Row::project, Row::quantize_z, Row::multiply};
}

}  // namespace
}  // namespace vitoats
