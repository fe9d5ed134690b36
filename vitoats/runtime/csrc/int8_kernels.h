// The int8 kernels, written once over an engine E, which an instruction set defines:
//
//   V                          a vector of floats (simd.h, quantize.h), which also has from_int(p): int32 lanes as floats
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

// The sums of up to kTokens tokens of x, for two strips, over all quads.
template <class E>
struct BlockProduct {
  static int64_t steps(int64_t) { return 1; }

  template <class SideWork>
  static void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
                  SideWork&& side_work) {
    product_of_count<E, E::kTokens>(count, x, stride, w0, w1, quads, sums);
    side_work();
  }
};

// Expands the strips of a panel, a few quads at a time.
template <class E>
class Expansion {
 public:
  Expansion() = default;
  Expansion(const SparseStrips& S, int64_t strip, int64_t strips, int8_t* target)
      : quads_(S.quads), padded_(divide_up(S.quads, kStepQuads) * kStepQuads), strips_(strips), target_(target) {
    for (int64_t i = 0; i < strips; ++i) {
      masks_[i] = S.masks + 8 * (strip + i) * S.quads;
      values_[i] = S.values[static_cast<size_t>(strip + i)];
    }
  }

  // Quads of each strip, the next ones.
  VITOATS_INLINE void advance(int64_t n) {
    const int64_t end = smaller(quad_ + n, quads_);
    for (; quad_ < end; ++quad_)
      for (int64_t i = 0; i < strips_; ++i) {
        const uint64_t mask = mask_at(masks_[i], quad_);
        E::store(target_ + (i * padded_ + quad_) * kQuadBytes, E::expand(mask, values_[i]));
        values_[i] += __builtin_popcountll(mask);
      }
  }

  // All that is left; zeros up to a whole step.
  void finish() {
    advance(quads_);
    for (int64_t i = 0; i < strips_; ++i)
      std::memset(target_ + (i * padded_ + quads_) * kQuadBytes, 0, static_cast<size_t>((padded_ - quads_) * kQuadBytes));
  }

  const int8_t* strip(int64_t i) const { return target_ + smaller(i, strips_ - 1) * padded_ * kQuadBytes; }

 private:
  int64_t quads_ = 0, padded_ = 0, strips_ = 0, quad_ = 0;
  int8_t* target_ = nullptr;
  const uint8_t* masks_[kPanelStrips] = {};
  const int8_t* values_[kPanelStrips] = {};
};

// Outputs of a block from its sums: scales, bias, activation, residual. Rows are finished a few at a time.
template <class E, bool with_gelu>
class Finish {
 public:
  Finish() = default;
  Finish(const Int8Weights& weights, const Int8Tokens& tokens, const Int8Output& output, int64_t strip, int64_t strips, int64_t token,
         int64_t count, const BlockSums& sums)
      : weights_(&weights), tokens_(&tokens), output_(&output), strip_(strip), strips_(strips), token_(token), count_(count),
        sums_(&sums) {}

  int64_t rows_left() const { return count_ - done_; }

  VITOATS_INLINE void advance(int64_t n) {
    const int64_t end = smaller(done_ + n, count_);
    for (; done_ < end; ++done_)
      for (int64_t i = 0; i < strips_; ++i) finish(done_, i);
  }

 private:
  using V = typename E::V;

  VITOATS_INLINE void finish(int64_t row, int64_t i) const {
    const Int8Weights& w = *weights_;
    const int64_t first = (strip_ + i) * kStripRows, token = token_ + row, part = w.part_of(strip_ + i);
    const auto scale = V::set1(tokens_->quantized.scale[token]), zero = V::set1(-tokens_->quantized.zero[token]);
    const int32_t *S = sums_->S + row * kPanelRows + i * kStripRows, *U = sums_->U + row * kPanelRows + i * kStripRows;
    const int64_t at = token * w.parts + part, left = w.rows - first;
    float* y = output_->y + token * w.rows + first;
    alignas(64) float padded[kStripRows], residual[kStripRows];
    const bool whole = left >= kStripRows;
    const float* added = output_->residual ? output_->residual + token * w.rows + first : nullptr;
    if (added && !whole) {
      std::memcpy(residual, added, static_cast<size_t>(left) * sizeof(float));
      added = residual;
    }
    float* target = whole ? y : padded;
#pragma GCC unroll 4
    for (int j = 0; j < kStripRows; j += V::lanes) {
      const float* constants = w.scale.data() + first + j;
      auto sum = V::fmadd(zero, V::loadu(w.S_sum.data() + first + j), V::from_int(S + j));
      sum = V::fmadd(V::mul(sum, V::loadu(constants)), scale, V::loadu(w.bias.data() + first + j));
      if (w.rank) {
        const auto z_scale = V::set1(tokens_->quantized_z.scale[at]), z_zero = V::set1(-tokens_->quantized_z.zero[at]);
        const auto z_sum = V::fmadd(z_zero, V::loadu(w.U_sum.data() + first + j), V::from_int(U + j));
        sum = V::fmadd(V::mul(z_sum, V::loadu(w.U_scale.data() + first + j)), z_scale, sum);
      }
      if constexpr (with_gelu) sum = gelu<V>(sum);
      if (added) sum = V::add(sum, V::loadu(added + j));
      V::storeu(target + j, sum);
    }
    if (!whole) std::memcpy(y, padded, static_cast<size_t>(left) * sizeof(float));
  }

  const Int8Weights* weights_ = nullptr;
  const Int8Tokens* tokens_ = nullptr;
  const Int8Output* output_ = nullptr;
  int64_t strip_ = 0, strips_ = 0, token_ = 0, count_ = 0, done_ = 0;
  const BlockSums* sums_ = nullptr;
};

// What a product does between its steps.
template <class E, bool with_gelu>
struct SideWork {
  Finish<E, with_gelu>& finish;
  Expansion<E>& expansion;
  int64_t rows, quads;  // at each call

  VITOATS_INLINE void operator()() const {
    finish.advance(rows);
    expansion.advance(quads);
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
    for (int64_t s = strip; s < strip_end; s += kPanelStrips) {
      const int64_t second = smaller(s + 1, strip_end - 1);
      for (int64_t t = token; t < token_end; t += E::kTokens) {
        const int64_t count = smaller(E::kTokens, token_end - t);
        BlockProduct<E>::run(tokens.quantized.q + t * tokens.quantized.stride, tokens.quantized.stride, count, strips.strip[static_cast<size_t>(s)],
                        strips.strip[static_cast<size_t>(second)], strips.quads, sums.S, NoSideWork());
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
    const auto run = weights.activation == Activation::kGelu ? multiply_by<true> : multiply_by<false>;
    run(weights, tokens, strip, strip_end, output, expanded);
  }

  template <bool with_gelu>
  static void multiply_by(const Int8Weights& weights, const Int8Tokens& tokens, int64_t strip, int64_t strip_end,
                          const Int8Output& output, int8_t* expanded) {
    const typename E::Scope scope;
    if (weights.sparse && tokens.count <= kDotTokens) return multiply_few<with_gelu>(weights, tokens, strip, strip_end, output);
    const int64_t quads = weights.sparse ? weights.S.quads : weights.dense.quads, blocks = divide_up(tokens.count, E::kTokens);
    const int64_t steps = BlockProduct<E>::steps(quads), half = expanded_bytes(weights) / 2;
    const auto panel = [&](int64_t s, int i) {
      return weights.sparse && s < strip_end ? Expansion<E>(weights.S, s, smaller(kPanelStrips, strip_end - s), expanded + i * half)
                                             : Expansion<E>();
    };
    BlockSums sums[2];
    int turn = 0, side = 0;
    Finish<E, with_gelu> finish;
    Expansion<E> current = panel(strip, side);
    for (int64_t s = strip; s < strip_end; s += kPanelStrips) {
      const int64_t strips = smaller(kPanelStrips, strip_end - s), second = s + strips - 1;
      current.finish();
      side ^= 1;
      Expansion<E> next = panel(s + kPanelStrips, side);
      const int8_t* w0 = weights.sparse ? current.strip(0) : weights.dense.strip[static_cast<size_t>(s)];
      const int8_t* w1 = weights.sparse ? current.strip(1) : weights.dense.strip[static_cast<size_t>(second)];
      const int64_t part = weights.part_of(s), part_end = weights.part_of(second);
      for (int64_t t = 0; t < tokens.count; t += E::kTokens) {
        const int64_t count = smaller(E::kTokens, tokens.count - t);
        BlockSums& block = sums[turn ^= 1];
        const SideWork<E, with_gelu> side_work{finish, next, divide_up(finish.rows_left(), steps), divide_up(quads, steps * blocks)};
        BlockProduct<E>::run(tokens.quantized.q + t * tokens.quantized.stride, tokens.quantized.stride, count, w0, w1, quads, block.S,
                        side_work);
        finish.advance(kMaxBlock);
        if (weights.rank) multiply_z(weights, tokens, s, second, part, part_end, t, count, block.U);
        finish = Finish<E, with_gelu>(weights, tokens, output, s, strips, t, count, block);
      }
      current = next;
    }
    finish.advance(kMaxBlock);
  }

  // U z for two strips, which may belong to different parts.
  VITOATS_INLINE static void multiply_z(const Int8Weights& weights, const Int8Tokens& tokens, int64_t s, int64_t second, int64_t part,
                                        int64_t part_end, int64_t token, int64_t count, int32_t* sums) {
    const int64_t stride = tokens.quantized_z.stride;
    const auto product = [&](int64_t of_part, int64_t a, int64_t b, int32_t* target) {
      BlockProduct<E>::run(tokens.quantized_z.q + (token * weights.parts + of_part) * stride, stride * weights.parts, count,
                      weights.U.strip[static_cast<size_t>(a)], weights.U.strip[static_cast<size_t>(b)], weights.U.quads, target,
                      NoSideWork());
    };
    product(part, s, second, sums);
    if (part == part_end) return;
    int32_t of_second[kMaxBlock * kPanelRows];
    product(part_end, second, second, of_second);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(sums + i * kPanelRows + kStripRows, of_second + i * kPanelRows, kStripRows * sizeof(int32_t));
  }

  // Few tokens: the weights are multiplied as they are expanded, without a panel in memory.
  template <bool with_gelu>
  static void multiply_few(const Int8Weights& weights, const Int8Tokens& tokens, int64_t strip, int64_t strip_end,
                           const Int8Output& output) {
    BlockSums sums;
    for (int64_t s = strip; s < strip_end; ++s) {
      dot_count<kDotTokens>(tokens.count, weights.S.masks + 8 * s * weights.S.quads, weights.S.values[static_cast<size_t>(s)],
                            weights.S.quads, tokens.quantized.q, tokens.quantized.stride, sums.S);
      for (int64_t t = 0; weights.rank && t < tokens.count; t += E::kTokens)
        multiply_z(weights, tokens, s, s, weights.part_of(s), weights.part_of(s), t, smaller(E::kTokens, tokens.count - t),
                   sums.U + t * kPanelRows);
      Finish<E, with_gelu>(weights, tokens, output, s, 1, 0, tokens.count, sums).advance(tokens.count);
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
