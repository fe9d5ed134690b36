// The int8 kernels, written once over an engine E, which an instruction set defines:
//
//   V                          a vector of floats (simd.h, quantize.h), which also has from_int(p): int32 lanes as floats,
//                              and fnmadd(a, b, c) = c - a b
//   Weights, Sums              64 bytes of a strip (16 outputs of 4 inputs), and 16 sums in int32
//   load(p), expand(mask, p)   Weights from memory; expand takes as many bytes as the mask has bits, and reads 64
//   store(p, w)                Weights to memory
//   zero(), add(a, b)          Sums
//   dot(s, x, w)               Sums, plus the products with the 4 bytes at x
//   store_sums(p, s)           to int32 [16]
//   kTokens                    tokens of a block, whose sums for two strips stay in registers
//   Scope                      an object that lives as long as a task
//
// An engine may also have a BlockProduct of its own. Two strips are a panel. A task expands a panel and passes over all tokens, a
// block at a time; the outputs of the block before are finished, and the next panel is expanded, in between the steps of a product.
#pragma once

#include "int8_finish.h"
#include "int8_panel.h"
#include "quantize.h"

namespace vitoats {
namespace {

// Nothing to do between the steps of a product.
struct NoSideWork {
  VITOATS_INLINE void operator()() const {}
};

// The product of engines whose dot works on registers: the sums of all tokens of a block for both strips.
template <class E, int tokens>
VITOATS_NOINLINE void product_of(const uint8_t* x, int64_t stride, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums) {
  typename E::Sums s[tokens][2];
#pragma GCC unroll 16
  for (int t = 0; t < tokens; ++t) s[t][0] = s[t][1] = E::zero();
#pragma GCC unroll 4
  for (const uint8_t* end = x + quads * kQuad; x < end; x += kQuad, w0 += kQuadBytes, w1 += kQuadBytes) {
    const auto a = E::load(w0), b = E::load(w1);
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) {
      s[t][0] = E::dot(s[t][0], x + t * stride, a);
      s[t][1] = E::dot(s[t][1], x + t * stride, b);
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
  static int64_t steps(int64_t) { return 2; }
  void finish() {}

  template <class SideWork>
  void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
           SideWork&& side_work) {
    side_work();
    side_work();
    product_of_count<E, E::kTokens>(count, x, stride, w0, w1, quads, sums);
  }
};

// What a product does after each of its steps, in turns: finishes tokens, or makes quads of the next panel ready.
template <class E, class FinishOf>
struct SideWork {
  FinishOf& finish;
  Panel<E>& next;
  int64_t tokens, quads;  // of a turn
  bool expand = false;

  VITOATS_INLINE void operator()() {
    if (expand) {
      next.advance(quads);
    } else {
      finish.advance(tokens);
    }
    expand = !expand;
  }
};

template <class E>
struct Int8KernelsOf {
  using V = typename E::V;

  static void quantize(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end, float* normalized) {
    const auto quantize_x = [&](const auto* x, int64_t t) {
      quantize_row<V>(x, weights.columns, range_of<V>(x, weights.columns), tokens.quantized, t);
    };
    for (int64_t t = token; t < token_end; ++t) {
      const Activations x = tokens.x.from(t * weights.columns);
      if (weights.norm.weight) {
        const Range<V> range = normalize_row<V>(x.float32, weights.columns, weights.norm, normalized);
        quantize_row<V>(normalized, weights.columns, range, tokens.quantized, t);
      } else {
        x.float32 ? quantize_x(x.float32, t) : quantize_x(x.float16, t);
      }
    }
  }

  static void quantize_z(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end) {
    for (int64_t row = token * weights.parts; row < token_end * weights.parts; ++row)
      quantize_row<V>(tokens.z + row * weights.z_stride(), weights.rank, range_of<V>(tokens.z + row * weights.z_stride(), weights.rank),
                      tokens.quantized_z, row);
  }

  static void project(const Int8Weights& weights, const Int8Tokens& tokens, int64_t token, int64_t token_end, int64_t strip,
                      int64_t strip_end) {
    const typename E::Scope scope;
    const DenseStrips& strips = weights.V;
    const int64_t width = weights.parts * weights.z_stride();
    BlockSums<E> sums;
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
    constexpr Run to_float[] = {
        multiply_to<Finish<E, float, false, false, false>>, multiply_to<Finish<E, float, false, false, true>>,
        multiply_to<Finish<E, float, false, true, false>>,  multiply_to<Finish<E, float, false, true, true>>,
        multiply_to<Finish<E, float, true, false, false>>,  multiply_to<Finish<E, float, true, false, true>>,
        multiply_to<Finish<E, float, true, true, false>>,   multiply_to<Finish<E, float, true, true, true>>};
    constexpr Run to_half[] = {
        multiply_to<Finish<E, BFloat16, false, false, false>>, multiply_to<Finish<E, BFloat16, false, true, false>>,
        multiply_to<Finish<E, Float16, true, false, false>>,   multiply_to<Finish<E, Float16, true, true, false>>};
    const int gelu = weights.activation == Activation::kGelu, z = weights.rank != 0, residual = output.residual != nullptr;
    const Run run = output.y ? to_float[gelu * 4 + z * 2 + residual] : to_half[gelu * 2 + z];
    run(weights, tokens, strip, strip_end, output, expanded);
  }

  template <class FinishOf>
  static void multiply_to(const Int8Weights& weights, const Int8Tokens& tokens, int64_t strip, int64_t strip_end,
                          const Int8Output& output, int8_t* expanded) {
    const typename E::Scope scope;
    if (weights.sparse && tokens.count <= kDotTokens) return multiply_few<FinishOf>(weights, tokens, strip, strip_end, output);
    const int64_t quads = weights.sparse ? weights.S.quads : weights.dense.quads, blocks = divide_up(tokens.count, E::kTokens);
    const int64_t steps = BlockProduct<E>::steps(quads), half = expanded_bytes(weights) / 2;
    const int64_t z_turns = weights.rank ? BlockProduct<E>::steps(weights.U.quads) : 0;
    const int64_t quads_of_turn = divide_up(quads, (divide_up(steps, 2) + z_turns) * blocks);
    const auto panel = [&](int64_t s, int i) {
      return s < strip_end ? Panel<E>(weights, s, smaller(s + 1, strip_end - 1), expanded + i * half) : Panel<E>();
    };
    BlockSums<E> sums;
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
        SideWork<E, FinishOf> side_work{finish, next, divide_up(finish.tokens_left(), divide_up(steps, 2)), quads_of_turn};
        product.run(tokens.quantized.q + t * tokens.quantized.stride, tokens.quantized.stride, count, current.strip(0),
                    current.strip(1), quads, sums.S, side_work);
        finish.advance(kBlock<E>);
        if (weights.rank)
          multiply_z(product, weights, tokens, s, second, part, part_end, t, count, sums.U, [&] { next.advance(quads_of_turn); });
        finish = FinishOf(weights, tokens, output, s, second, t, count, sums);
      }
      current = next;
    }
    product.finish();
    finish.advance(kBlock<E>);
  }

  // U z for two strips, which may belong to different parts; turn() is called after each step.
  template <class Turn>
  VITOATS_INLINE static void multiply_z(BlockProduct<E>& product, const Int8Weights& weights, const Int8Tokens& tokens, int64_t s,
                                        int64_t second, int64_t part, int64_t part_end, int64_t token, int64_t count,
                                        int32_t* sums, Turn&& turn) {
    const int64_t stride = tokens.quantized_z.stride;
    const auto multiply = [&](int64_t of_part, int64_t a, int64_t b, int32_t* target) {
      product.run(tokens.quantized_z.q + (token * weights.parts + of_part) * stride, stride * weights.parts, count,
                  weights.U.strip[static_cast<size_t>(a)], weights.U.strip[static_cast<size_t>(b)], weights.U.quads, target,
                  turn);
    };
    multiply(part, s, second, sums);
    if (part == part_end) return;
    int32_t of_second[kBlock<E> * kPanelRows];
    multiply(part_end, second, second, of_second);
    product.finish();
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(sums + i * kPanelRows + kStripRows, of_second + i * kPanelRows, kStripRows * sizeof(int32_t));
  }

  // Few tokens: the weights are multiplied as they are expanded, without a panel in memory.
  template <class FinishOf>
  static void multiply_few(const Int8Weights& weights, const Int8Tokens& tokens, int64_t strip, int64_t strip_end,
                           const Int8Output& output) {
    BlockSums<E> sums;
    BlockProduct<E> product;
    for (int64_t s = strip; s < strip_end; ++s) {
      dot_count<kDotTokens>(tokens.count, weights.S.masks + 8 * s * weights.S.quads, weights.S.values[static_cast<size_t>(s)],
                            weights.S.quads, tokens.quantized.q, tokens.quantized.stride, sums.S);
      for (int64_t t = 0; weights.rank && t < tokens.count; t += E::kTokens)
        multiply_z(product, weights, tokens, s, s, weights.part_of(s), weights.part_of(s), t, smaller(E::kTokens, tokens.count - t),
                   sums.U + t * kPanelRows, NoSideWork());
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
