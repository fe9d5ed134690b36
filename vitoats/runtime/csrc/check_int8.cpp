// Compares all int8 kernels that run on this processor with a plain computation, for random shapes and patterns:
//   check_int8 [CASES] [SEED]
// or measures the time of the processor for one product, in microseconds, and 10^9 multiply-adds per second:
//   check_int8 time TOKENS ROWS COLUMNS RANK PARTS [ZEROS [FORM]]      FORM: any of the letters n (LayerNorm), g (GELU), a (Add)
// The buffers have no slack, so a sanitizer or an emulator detects any access past their end. Some tokens contain an infinity or
// NaN: their outputs must be NaN, and those of the other tokens unaffected.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "half.h"
#include "int8_product.h"
#include "int8_weights.h"
#include "isa.h"

namespace {

using vitoats::kQuad;
using vitoats::kStripRows;

struct Serial : vitoats::Parallel {
  void run(void (*call)(void*, size_t), size_t n, void* context) const override {
    for (size_t i = 0; i < n; ++i) call(context, i);
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

size_t at(int64_t i) { return static_cast<size_t>(i); }

// Memory for vectors at whole cache lines, as ONNX Runtime's.
template <class T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <class Other>
  Lines(const Lines<Other>&) {}
  static constexpr std::align_val_t kLine{64};
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};
using Bytes = std::vector<int8_t, Lines<int8_t>>;
using Floats = std::vector<float, Lines<float>>;

// [rows, columns] as strips of quads, padded with zeros.
Bytes tiled(const std::vector<int8_t>& matrix, int64_t rows, int64_t columns) {
  const int64_t strips = ceil_div(rows, kStripRows), quads = ceil_div(columns, kQuad);
  Bytes found(at(strips * quads * kStripRows * kQuad));
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t k = 0; k < columns; ++k)
      found[at(((n / kStripRows * quads + k / kQuad) * kStripRows + n % kStripRows) * kQuad + k % kQuad)] = matrix[at(n * columns + k)];
  return found;
}

// A node with random weights, and everything it is made of.
struct Case {
  int64_t rows, columns, parts, rank;
  bool sparse;
  std::vector<int8_t> S, U, V;  // [rows, columns], [rows, rank], [parts * rank, columns]
  Bytes S_tiled, values, U_tiled, V_tiled;
  std::vector<uint8_t> mask;
  std::vector<float> scale, bias, U_scale, V_scale, norm_weight, norm_bias;
  vitoats::Int8Constants constants{};

  // Weights are means of so many random numbers: of one, all are equally likely; of four, they are as good as normal.
  Case(std::mt19937& random, int64_t rows_, int64_t columns_, int64_t parts_, int64_t rank_, double zeros, bool sparse_,
       const std::string& form, int mean_of = 1)
      : rows(rows_), columns(columns_), parts(parts_), rank(rank_), sparse(sparse_) {
    const auto number = [&] { return static_cast<float>(static_cast<double>(random()) / random.max() * 2 - 1); };
    const auto fill = [&](std::vector<int8_t>& matrix, int64_t n, double without) {
      for (int64_t i = 0; i < n; ++i) {
        int sum = 0;
        if (static_cast<double>(random()) / random.max() >= without)
          for (int j = 0; j < mean_of; ++j) sum += static_cast<int8_t>(random());
        matrix.push_back(static_cast<int8_t>(sum / mean_of));
      }
    };
    const auto floats = [&](std::vector<float>& numbers, int64_t n) {
      for (int64_t i = 0; i < n; ++i) numbers.push_back(number());
    };
    fill(S, rows * columns, zeros);
    S_tiled = tiled(S, rows, columns);
    for (size_t i = 0; i < S_tiled.size(); ++i) {
      if (i % 8 == 0) mask.push_back(0);
      if (!S_tiled[i]) continue;
      mask.back() = static_cast<uint8_t>(mask.back() | 1 << i % 8);
      values.push_back(S_tiled[i]);
    }
    floats(scale, rows);
    floats(bias, rows);
    for (float& s : scale) s /= 1000;
    constants.rows = rows;
    constants.columns = columns;
    constants.mask = sparse ? mask.data() : nullptr;
    constants.values = sparse ? values.data() : S_tiled.data();
    constants.n_values = static_cast<int64_t>(values.size());
    constants.scale = scale.data();
    constants.bias = bias.data();
    constants.parts = parts;
    if (sparse && rank) {
      fill(U, rows * rank, 0);
      fill(V, parts * rank * columns, 0);
      U_tiled = tiled(U, rows, rank);
      for (int64_t p = 0; p < parts; ++p) {
        const auto begin = V.begin() + p * rank * columns;
        const Bytes part = tiled({begin, begin + rank * columns}, rank, columns);
        V_tiled.insert(V_tiled.end(), part.begin(), part.end());
      }
      floats(U_scale, rows);
      floats(V_scale, parts * rank);
      for (float& s : U_scale) s /= 1000;
      for (float& s : V_scale) s /= 1000;
      constants.rank = rank;
      constants.U = U_tiled.data();
      constants.U_scale = U_scale.data();
      constants.V = V_tiled.data();
      constants.V_scale = V_scale.data();
    }
    if (form.find('n') != std::string::npos) {
      floats(norm_weight, columns);
      floats(norm_bias, columns);
      constants.norm = {norm_weight.data(), norm_bias.data(), 1e-6f};
    }
    if (form.find('g') != std::string::npos) constants.activation = vitoats::Activation::kGelu;
  }
};

struct Quantized {
  std::vector<int64_t> q;
  float scale, zero;
};

Quantized quantize(const std::vector<float>& v) {
  float low = 0, high = 0;
  for (const float x : v) low = std::min(low, x), high = std::max(high, x);
  Quantized found{std::vector<int64_t>(v.size()), high * (1.f / 255) - low * (1.f / 255), 0};
  if (!(found.scale > 0)) return found;
  const float inverse = 1 / found.scale;
  found.zero = std::nearbyint(-low * inverse);
  for (size_t i = 0; i < v.size(); ++i)
    found.q[i] = static_cast<int64_t>(std::clamp(std::nearbyint(v[i] * inverse) + found.zero, 0.f, 255.f));
  return found;
}

// The outputs of a token by the formula, in double; size is the sum of absolute values of what was added.
void expected(const Case& c, const float* x, const float* residual, std::vector<double>& y, std::vector<double>& size) {
  std::vector<float> row(x, x + c.columns);
  if (c.constants.norm.weight) {
    double mean = 0, variance = 0;
    for (const float v : row) mean += v / static_cast<double>(c.columns);
    for (const float v : row) variance += (v - mean) * (v - mean) / static_cast<double>(c.columns);
    for (int64_t k = 0; k < c.columns; ++k)
      row[at(k)] = static_cast<float>((row[at(k)] - mean) / std::sqrt(variance + c.constants.norm.epsilon) * c.norm_weight[at(k)] +
                                      c.norm_bias[at(k)]);
  }
  const Quantized xq = quantize(row);
  const auto dot = [](const int8_t* w, const Quantized& v) {
    int64_t sum = 0;
    for (size_t k = 0; k < v.q.size(); ++k) sum += w[k] * (v.q[k] - static_cast<int64_t>(v.zero));
    return static_cast<double>(sum);
  };
  std::vector<Quantized> zq;
  for (int64_t p = 0; p < c.parts && c.constants.rank; ++p) {
    std::vector<float> z;
    for (int64_t r = p * c.rank; r < (p + 1) * c.rank; ++r)
      z.push_back(static_cast<float>(dot(c.V.data() + r * c.columns, xq)) * c.V_scale[at(r)] * xq.scale);
    zq.push_back(quantize(z));
  }
  for (int64_t n = 0; n < c.rows; ++n) {
    const double of_S = dot(c.S.data() + n * c.columns, xq) * c.scale[at(n)] * xq.scale;
    double sum = of_S + c.bias[at(n)];
    size[at(n)] = std::fabs(of_S) + std::fabs(c.bias[at(n)]) + static_cast<double>(c.columns) * xq.scale * std::fabs(c.scale[at(n)]);
    if (c.constants.rank) {
      const Quantized& z = zq[at(n / (c.rows / c.parts))];
      sum += dot(c.U.data() + n * c.rank, z) * c.U_scale[at(n)] * z.scale;
      // one number of z next to the middle between two bytes may be rounded either way
      size[at(n)] += 1.1e5 * 128 * std::fabs(c.U_scale[at(n)]) * z.scale;
    }
    if (c.constants.activation == vitoats::Activation::kGelu) sum = sum * (1 + std::erf(sum / std::sqrt(2.0))) / 2;
    if (residual) sum += residual[n], size[at(n)] += std::fabs(residual[n]);
    y[at(n)] = sum;
  }
}

int check(const char* isa, std::mt19937& random, const Case& c, int64_t tokens, bool add) {
  std::vector<float> x(at(tokens * c.columns)), y(at(tokens * c.rows), NAN), residual(add ? y.size() : 0);
  for (std::vector<float>* numbers : {&x, &residual})
    for (float& v : *numbers) v = static_cast<float>(static_cast<double>(random()) / random.max() * 2 - 1);
  std::vector<bool> special(at(tokens));
  for (int64_t t = 0; t < tokens; ++t) {
    if (random() % 5 == 0) std::fill_n(x.begin() + t * c.columns, c.columns, random() % 2 ? 0.f : 2.5f);
    if (random() % 5) continue;
    const float numbers[] = {INFINITY, -INFINITY, NAN, -NAN};
    special[at(t)] = true;
    x[at(t * c.columns + static_cast<int64_t>(random()) % c.columns)] = numbers[random() % 4];
  }
  const vitoats::Int8Product product(vitoats::prepare_int8(c.constants), vitoats::int8_row(isa));
  product.run(x.data(), tokens, vitoats::Int8Output(y.data(), add ? residual.data() : nullptr), Serial());

  std::vector<double> sum(at(c.rows)), size(at(c.rows));
  for (int64_t t = 0; t < tokens; ++t) {
    if (!special[at(t)]) expected(c, x.data() + t * c.columns, add ? residual.data() + t * c.rows : nullptr, sum, size);
    for (int64_t n = 0; n < c.rows; ++n) {
      const double found = y[at(t * c.rows + n)], right = special[at(t)] ? NAN : sum[at(n)];
      // with a LayerNorm, an input may be rounded either way as well
      const double tolerance = (c.constants.norm.weight ? 2e-2 : 1e-5) * size[at(n)] + 4e-6;
      if (special[at(t)] ? std::isnan(found) : std::fabs(found - right) <= tolerance) continue;
      std::printf("%s, %s %lld x %lld, %lld parts of rank %lld, %lld tokens: y[%lld, %lld] = %.9g, not %.9g\n", isa,
                  c.sparse ? "sparse" : "dense", static_cast<long long>(c.rows), static_cast<long long>(c.columns),
                  static_cast<long long>(c.parts), static_cast<long long>(c.constants.rank), static_cast<long long>(tokens),
                  static_cast<long long>(t), static_cast<long long>(n), found, right);
      return 1;
    }
  }
  return 0;
}

// Outputs in float16 and bfloat16 are those in float32, rounded, and inputs in float16 give what the same numbers in float32 do.
int check_halves(const char* isa, std::mt19937& random, const Case& c, int64_t tokens) {
  std::vector<float> x(at(tokens * c.columns)), y(at(tokens * c.rows));
  std::vector<vitoats::Float16> x_half, y_float16(y.size());
  for (float& v : x) {
    v = static_cast<float>(static_cast<double>(random()) / random.max() * 2 - 1);
    if (random() % 500 == 0) v = NAN;
    x_half.push_back(vitoats::to_float16(v));
    v = vitoats::from_float16(x_half.back());
  }
  const vitoats::Int8Product product(vitoats::prepare_int8(c.constants), vitoats::int8_row(isa));
  product.run(x.data(), tokens, vitoats::Int8Output(y.data()), Serial());
  bool same = true;
  const auto equal = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  if (c.constants.activation == vitoats::Activation::kGelu) {
    product.run(x.data(), tokens, vitoats::Int8Output(y_float16.data()), Serial());
    for (size_t i = 0; i < y.size(); ++i)
      same &= equal(vitoats::from_float16(y_float16[i]), vitoats::from_float16(vitoats::to_float16(y[i])));
  } else {
    std::vector<vitoats::BFloat16> y_bfloat16(y.size());
    product.run(x.data(), tokens, vitoats::Int8Output(y_bfloat16.data()), Serial());
    for (size_t i = 0; i < y.size(); ++i) same &= y_bfloat16[i].bits == vitoats::to_bfloat16(y[i]).bits;
  }
  if (!c.constants.norm.weight) {
    std::vector<float> of_half(y.size());
    product.run(x_half.data(), tokens, vitoats::Int8Output(of_half.data()), Serial());
    for (size_t i = 0; i < y.size(); ++i) same &= equal(of_half[i], y[i]);
  }
  if (!same) std::printf("%s: float16 or bfloat16 differ from float32\n", isa);
  return same ? 0 : 1;
}

double processor_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void measure(int64_t tokens, int64_t rows, int64_t columns, int64_t rank, int64_t parts, double zeros, const std::string& form) {
  std::mt19937 random(0);
  for (const char* const* isa = vitoats::supported_isas(); *isa; ++isa) {
    const char* wanted = std::getenv("VITOATS_ISA");
    if (std::strcmp(vitoats::int8_row(*isa).isa, wanted ? wanted : *isa) || (!wanted && !std::strcmp(*isa, "portable"))) continue;
    for (const bool sparse : {false, true}) {
      // several nodes in turns, so that the weights do not stay in the first caches
      std::vector<Case> cases;
      std::vector<vitoats::Int8Product> products;
      for (int i = 0; i < 8; ++i) cases.emplace_back(random, rows, columns, parts, sparse ? rank : 0, sparse ? zeros : 0, sparse, form, 4);
      for (const Case& c : cases) products.emplace_back(vitoats::prepare_int8(c.constants), vitoats::int8_row(*isa));
      Floats x(at(tokens * columns)), y(at(tokens * rows)), residual(y.size());
      for (float& v : x) v = static_cast<float>(static_cast<double>(random()) / random.max() * 2 - 1);
      const bool add = form.find('a') != std::string::npos;
      double best = 1e9;
      for (int i = 0; i < 30; ++i) {
        const double start = processor_seconds();
        for (const auto& product : products) product.run(x.data(), tokens, vitoats::Int8Output(y.data(), add ? residual.data() : nullptr), Serial());
        best = std::min(best, (processor_seconds() - start) / static_cast<double>(products.size()));
      }
      std::printf("%-12s %-7s %8.1f us %7.0f\n", *isa, sparse ? "sparse" : "dense", best * 1e6,
                  1e-9 * static_cast<double>(tokens * rows * columns) / best);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 6 && !std::strcmp(argv[1], "time")) {
    measure(std::atoll(argv[2]), std::atoll(argv[3]), std::atoll(argv[4]), std::atoll(argv[5]), std::atoll(argv[6]),
            argc > 7 ? std::atof(argv[7]) : 0.625, argc > 8 ? argv[8] : "");
    return 0;
  }
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0);
  const double zeros[] = {0, 0.5, 0.625, 0.9, 1};
  const char* forms[] = {"", "n", "g", "a", "ng", "na"};
  int failed = 0, done = 0;
  for (const char* const* isa = vitoats::supported_isas(); *isa; ++isa)
    for (int i = 0; i < cases; ++i, ++done) {
      const int64_t parts = i % 3 ? 1 : 1 + static_cast<int64_t>(random()) % 3, rank = static_cast<int64_t>(random()) % (i % 4 ? 20 : 100);
      const int64_t of_part = parts > 1 ? kStripRows * (1 + static_cast<int64_t>(random()) % 4) : 1 + static_cast<int64_t>(random()) % 100;
      const int64_t columns = 1 + static_cast<int64_t>(random()) % (i % 5 ? 150 : 600);
      const int64_t tokens = i % 3 ? 1 + static_cast<int64_t>(random()) % 50 : 1 + static_cast<int64_t>(random()) % 260;
      const std::string form = forms[random() % 6];
      const Case c(random, parts * of_part, columns, parts, rank, zeros[random() % 5], random() % 3 != 0, form);
      failed += check(*isa, random, c, tokens, form.find('a') != std::string::npos) || check_halves(*isa, random, c, tokens);
    }
  std::printf("%d passed, %d failed\n", done - failed, failed);
  return failed != 0;
}
