// Attention of one head, over an arithmetic A: what the products multiply, and how.
//
// A *step* is what one multiply-add takes from each operand in 32 bits: a float, or a pair of bfloat16. All operands are arrays
// of steps. A product is c [rows, columns] = a [rows, steps] b, where b is cut into panels of up to kPanel vectors of columns,
// each [steps, columns of the panel]. Two of them make attention, for a block of queries and a block of keys at a time:
//     scores = queries (keys)^T, with panels of keys          weights = 2^(scores - largest)          y += weights (values) / sum
// The largest score and the sum of weights so far are kept for each query; what a block of keys adds to y scales down what was
// there before.
//
// Queries are packed with scale log2(e) in them. A query with an infinity or NaN has NaN in its sum of weights from the start, and
// all queries if one is in keys or values; so have their outputs.
//
// A has: V; kSteps: numbers in a step; kStepGroup: steps are padded with zeros to a multiple of it; kQueries: in a block;
// kDegree: of the polynomial in exp2; Context, an object that exists while products are computed; pack(first, second): the
// lanes of two vectors, in order, as steps; interleave(first, second): lane i of both vectors as step i (with one number in a
// step they return the first vector); multiply(a, a_stride, rows, b, vectors, steps, c, c_stride), which may also write the rows
// of c up to kQueries.
#pragma once

#include "attention_kernels.h"
#include "exp2.h"
#include "simd.h"

namespace vitoats {
namespace {
namespace attention {

constexpr int64_t kKeys = 512;                  // in a block
constexpr int64_t kScoreStride = kKeys + 16;    // not a multiple of a page, or rows would compete for cache sets
constexpr int64_t kAhead = 12;                  // rows from the one that is packed to the one that is prefetched
constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLowest = -3.402823466e38f;

// Vectors in a panel, and so in the registers of a product's row.
template <class V>
constexpr int kPanel = V::registers >= 32 ? 4 : 2;

VITOATS_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
VITOATS_INLINE int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// The parts of a packed head.
template <class A>
struct Packed {
  using V = typename A::V;
  static constexpr int64_t kChecks = 16;  // 64 bytes

  int64_t steps;                 // of the first product
  int64_t key_steps;             // of the second
  int64_t key_lanes, width_lanes, queries;
  float *query_checks;           // [queries], NaN where a query has an infinity or NaN, else 0
  float *key_check, *value_check;  // likewise for all keys, and for all values
  float* q;                      // [queries, steps]
  float* k;                      // panels of keys: [steps, lanes]
  float* v;                      // panels of the width: [key_steps, lanes]
  int64_t size;                  // of all

  Packed(const Head& head, float* packed)
      : steps(round_up(divide_up(head.width, A::kSteps), A::kStepGroup)),
        key_steps(round_up(divide_up(head.tokens, A::kSteps), A::kStepGroup)),
        key_lanes(round_up(head.tokens, V::lanes)),
        width_lanes(round_up(head.width, V::lanes)),
        queries(round_up(head.tokens, A::kQueries)),
        size(0) {
    const auto take = [&](int64_t floats) {
      const int64_t at = size;
      size += round_up(floats, 16);
      return packed + at;
    };
    query_checks = take(queries);
    key_check = take(1);
    value_check = take(1);
    q = take(queries * steps);
    k = take(key_lanes * steps);
    v = take(width_lanes * key_steps);
  }
};

// n numbers from p on, up to a vector of steps of them, padded with zeros; adds 0 to check, or NaN if one is not finite.
template <class A, class Number>
VITOATS_INLINE typename A::V::T load_steps(const Number* p, int64_t n, typename A::V::T factor, typename A::V::T& check) {
  using V = typename A::V;
  auto first = load_values<V>(p, p + n), second = V::zero();
  check = V::fmadd(first, V::zero(), check);
  first = V::mul(first, factor);
  if (A::kSteps == 2 && n > V::lanes) {
    second = load_values<V>(p + V::lanes, p + n);
    check = V::fmadd(second, V::zero(), check);
    second = V::mul(second, factor);
  }
  return A::pack(first, second);
}

// Rows of one head are far apart, so that the processor does not foresee which is next.
template <int write = 0, class Number>
VITOATS_INLINE void prefetch_row(const Head& head, const Number* part, int64_t stride, int64_t token) {
  if (token >= head.tokens) return;
  for (int64_t i = 0; i < head.width; i += 64 / sizeof(Number)) __builtin_prefetch(part + token * stride + i, write);
}

template <class A, class Number>
void pack_queries(const Head& head, const Number* q, const Packed<A>& packed, int64_t query) {
  using V = typename A::V;
  const auto factor = V::set1(head.scale * kLog2E);
  for (int64_t i = query; i < query + A::kQueries; ++i) {
    auto check = V::zero();
    for (int64_t s = 0; s < packed.steps; s += V::lanes) {
      const int64_t left = i < head.tokens ? head.width - s * A::kSteps : 0;
      const auto steps = load_steps<A>(q + i * head.stride + s * A::kSteps, left, factor, check);
      store_values<V>(packed.q + i * packed.steps + s, packed.steps - s, steps);
    }
    packed.query_checks[i] = V::sum(check);
  }
}

template <class A, class Number>
void pack_keys(const Head& head, const Number* k, const Packed<A>& packed) {
  using V = typename A::V;
  constexpr int L = V::lanes;
  alignas(64) float square[L * L], transposed[L * L];
  auto check = V::zero();
  for (int64_t key = 0; key < packed.key_lanes; key += L) {
    const int64_t panel = key / (kPanel<V> * L) * (kPanel<V> * L);
    const int64_t panel_lanes = smaller(kPanel<V> * L, packed.key_lanes - panel);
    float* target = packed.k + panel * packed.steps + (key - panel);
    for (int64_t i = 0; i < L; ++i) prefetch_row(head, k, head.stride, key + L + i);
    for (int64_t s = 0; s < packed.steps; s += L) {
      for (int64_t i = 0; i < L; ++i) {
        const int64_t left = key + i < head.tokens ? head.width - s * A::kSteps : 0;
        const Number* source = k + (key + i) * head.stride + s * A::kSteps;
        V::store(square + i * L, load_steps<A>(source, left, V::set1(1), check));
      }
      if (packed.steps - s >= L) {
        V::transpose(square, L, target + s * panel_lanes, panel_lanes);
      } else {
        V::transpose(square, L, transposed, L);
        for (int64_t i = 0; i < packed.steps - s; ++i)
          V::store(target + (s + i) * panel_lanes, V::load(transposed + i * L));
      }
    }
  }
  *packed.key_check = V::sum(check);
}

template <class A, class Number>
void pack_values(const Head& head, const Number* v, const Packed<A>& packed) {
  using V = typename A::V;
  constexpr int64_t kLanes = kPanel<V> * V::lanes;
  auto check = V::zero();
  for (int64_t s = 0; s < packed.key_steps; ++s) {
    const Number* rows[2] = {};
    for (int i = 0; i < A::kSteps; ++i) {
      const int64_t key = s * A::kSteps + i;
      if (key < head.tokens) rows[i] = v + key * head.stride;
      prefetch_row(head, v, head.stride, key + kAhead);
    }
    for (int64_t panel = 0; panel < packed.width_lanes; panel += kLanes) {
      const int64_t lanes = smaller(kLanes, packed.width_lanes - panel);
      float* target = packed.v + panel * packed.key_steps + s * lanes;
      for (int64_t lane = 0; lane < lanes; lane += V::lanes) {
        typename V::T numbers[2] = {V::zero(), V::zero()};
        for (int i = 0; i < A::kSteps; ++i) {
          if (!rows[i]) continue;
          numbers[i] = load_values<V>(rows[i] + panel + lane, rows[i] + head.width);
          check = V::fmadd(numbers[i], V::zero(), check);
        }
        V::store(target + lane, A::interleave(numbers[0], numbers[1]));
      }
    }
  }
  *packed.value_check = V::sum(check);
}

// What is known of a block of queries, up to the last block of keys.
template <class A>
struct Softmax {
  using V = typename A::V;
  static constexpr int64_t kRows = (A::kQueries + V::lanes - 1) / V::lanes * V::lanes;

  alignas(64) float scores[A::kQueries * kScoreStride];
  alignas(64) float largest[kRows];
  alignas(64) float sum[kRows];
  alignas(64) float old[kRows], now[kRows];  // factors for y so far, and for the product with the weights of this block of keys
  alignas(64) float last_lanes[V::lanes];  // 0 where the last vector of a row has a score, else -infinity

  // Turns the scores of some keys into weights, as steps.
  void add(int64_t rows, int64_t keys) {
    const int64_t whole = keys / V::lanes * V::lanes;
    if (keys > whole)
      for (int i = 0; i < V::lanes; ++i) last_lanes[i] = whole + i < keys ? 0 : -__builtin_inff();
    alignas(64) float larger[kRows] = {};
    for (int64_t i = 0; i < rows; ++i) larger[i] = largest_of(scores + i * kScoreStride, keys, whole, largest[i]);
    for (int64_t i = 0; i < rows; i += V::lanes) {
      V::store(old + i, V::mul(V::load(sum + i), exp2<V, A::kDegree>(V::sub(V::load(largest + i), V::load(larger + i)))));
      V::store(largest + i, V::load(larger + i));
    }
    for (int64_t i = 0; i < rows; ++i) sum[i] = old[i] + weigh(scores + i * kScoreStride, keys, largest[i]);
    for (int64_t i = 0; i < rows; ++i) {
      now[i] = 1 / sum[i];
      old[i] *= now[i];
    }
  }

 private:
  VITOATS_INLINE float largest_of(float* row, int64_t keys, int64_t whole, float so_far) {
    constexpr int L = V::lanes;
    auto first = V::set1(so_far), second = first;
    if (keys > whole) {
      const auto masked = V::add(V::load(row + whole), V::load(last_lanes));
      V::store(row + whole, masked);
      second = V::max(second, masked);
    }
    int64_t i = 0;
    for (; i + 2 * L <= whole; i += 2 * L) {
      first = V::max(first, V::load(row + i));
      second = V::max(second, V::load(row + i + L));
    }
    if (i < whole) first = V::max(first, V::load(row + i));
    return V::largest(V::max(first, second));
  }

  VITOATS_INLINE float weigh(float* row, int64_t keys, float row_largest) {
    constexpr int L = V::lanes;
    const auto shift = V::set1(row_largest);
    auto first_sum = V::zero(), second_sum = V::zero();
    float* target = row;
    int64_t i = 0;
    for (; i + L < keys; i += 2 * L) {
      const auto first = exp2<V, A::kDegree>(V::sub(V::load(row + i), shift));
      const auto second = exp2<V, A::kDegree>(V::sub(V::load(row + i + L), shift));
      first_sum = V::add(first_sum, first);
      second_sum = V::add(second_sum, second);
      V::store(target, A::pack(first, second));
      if (A::kSteps == 1) V::store(target + L, second);
      target += 2 * L / A::kSteps;
    }
    if (i < keys) {
      const auto last = exp2<V, A::kDegree>(V::sub(V::load(row + i), shift));
      first_sum = V::add(first_sum, last);
      V::store(target, A::pack(last, V::zero()));
    }
    return V::sum(V::add(first_sum, second_sum));
  }
};

// y [rows, n] = old y + now product [rows, n], with a factor for each row; without old factors, y is new.
template <class V>
VITOATS_INLINE void accumulate(const float* product, int64_t product_stride, int64_t rows, int64_t n, const float* old,
                               const float* now, float* y, int64_t y_stride) {
  for (int64_t i = 0; i < rows; ++i, product += product_stride, y += y_stride)
    for (int64_t j = 0; j < n; j += V::lanes) {
      auto sum = V::mul(V::load(product + j), V::set1(now[i]));
      if (old) sum = V::fmadd(load_values<V>(y + j, y + n), V::set1(old[i]), sum);
      store_values<V>(y + j, n - j, sum);
    }
}

// Calls body with a pointer to the numbers, of their type.
template <class A, class Body>
VITOATS_INLINE void with_type(const Activations& numbers, const Body& body) {
  if constexpr (A::kSteps == 2) {
    if (numbers.bfloat16) return body(numbers.bfloat16);
  }
  body(numbers.float32);
}

template <class A, class Number>
void attend_block(const Head& head, const Number* q, const Packed<A>& packed, int64_t query, int64_t rows) {
  using V = typename A::V;
  constexpr int64_t kLanes = kPanel<V> * V::lanes;
  pack_queries(head, q, packed, query);
  for (int64_t i = query; i < query + A::kQueries; ++i) {
    prefetch_row<1>(head, head.y, head.y_stride, i);
    prefetch_row(head, q, head.stride, i + A::kQueries);  // of the next block
  }
  Softmax<A> softmax;
  alignas(64) float product[A::kQueries * kLanes];
  for (int64_t i = 0; i < softmax.kRows; ++i) {
    softmax.largest[i] = kLowest;
    softmax.sum[i] = i < rows ? packed.query_checks[query + i] + *packed.key_check + *packed.value_check : 0;
  }
  float* y = head.y + query * head.y_stride;
  for (int64_t key = 0; key < head.tokens; key += kKeys) {
    const int64_t keys = smaller(kKeys, head.tokens - key);
    A::multiply(packed.q + query * packed.steps, packed.steps, rows, packed.k + key * packed.steps, divide_up(keys, V::lanes),
                packed.steps, softmax.scores, kScoreStride);
    softmax.add(rows, keys);
    const int64_t steps = round_up(divide_up(keys, A::kSteps), A::kStepGroup);
    for (int64_t column = 0; column < head.width; column += kLanes) {
      const int64_t columns = smaller(kLanes, head.width - column), vectors = divide_up(columns, V::lanes);
      const float* values = packed.v + column * packed.key_steps + key / A::kSteps * vectors * V::lanes;
      A::multiply(softmax.scores, kScoreStride, rows, values, vectors, steps, product, kLanes);
      accumulate<V>(product, kLanes, rows, columns, key ? softmax.old : nullptr, softmax.now, y + column, head.y_stride);
    }
  }
}

template <class A>
int64_t packed_size(const Head& head) {
  return Packed<A>(head, nullptr).size;
}

template <class A>
void pack(const Head& head, HeadPart part, float* target) {
  const Packed<A> packed(head, target);
  if (part == HeadPart::kKeys) with_type<A>(head.k, [&](const auto* k) { pack_keys(head, k, packed); });
  if (part == HeadPart::kValues) with_type<A>(head.v, [&](const auto* v) { pack_values(head, v, packed); });
}

template <class A>
void attend(const Head& head, float* source, int64_t query, int64_t query_end) {
  const Packed<A> packed(head, source);
  [[maybe_unused]] const typename A::Context context;
  with_type<A>(head.q, [&](const auto* q) {
    for (; query < query_end; query += A::kQueries) attend_block(head, q, packed, query, smaller(A::kQueries, query_end - query));
  });
}

template <class A>
constexpr AttentionKernels kernels(const char* isa) {
  return {isa, A::kSteps == 2, A::kQueries, packed_size<A>, pack<A>, attend<A>};
}

}  // namespace attention
}  // namespace
}  // namespace vitoats
