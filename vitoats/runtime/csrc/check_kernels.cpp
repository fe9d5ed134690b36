// Compares all kernels that run on this processor with double precision, for random shapes and sparsity patterns:
// check_kernels [CASES] [SEED]. The buffers have no slack, so a sanitizer or an emulator detects any access past their end.
// Some tokens contain an infinity or NaN: their outputs must be NaN, and those of the other tokens unaffected. The thread's
// floating-point state must be preserved.
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "isa.h"
#include "product.h"

namespace {

struct Serial : vitoats::Parallel {
  void run(void (*call)(void*, size_t), size_t n, void* context) const override {
    for (size_t i = 0; i < n; ++i) call(context, i);
  }
};

uint16_t to_half(float f) {  // exact for small multiples of 1/64
  if (f == 0) return 0;
  int exponent;
  const float fraction = std::frexp(std::fabs(f), &exponent);  // in [1/2, 1)
  return static_cast<uint16_t>((f < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | (static_cast<int>(fraction * 2048) & 0x3ff));
}

int report(const vitoats::Kernels& kernels, int64_t rows, int64_t columns, int64_t tokens, int64_t t, int64_t r,
           const std::vector<float>& y, double expected) {
  std::printf("%s, float%d: %lld x %lld, %lld tokens: y[%lld, %lld] = %.9g, not %.9g\n", kernels.isa,
              kernels.value_type == vitoats::ValueType::kFloat16 ? 16 : 32, static_cast<long long>(rows),
              static_cast<long long>(columns), static_cast<long long>(tokens), static_cast<long long>(t), static_cast<long long>(r),
              y[static_cast<size_t>(t * rows + r)], expected);
  return 1;
}

int check(const vitoats::Kernels& kernels, std::mt19937& random, int64_t rows, int64_t columns, int64_t tokens, double zeros,
          bool with_bias, int64_t parts, int64_t rank) {
  const bool half = kernels.value_type == vitoats::ValueType::kFloat16;
  const auto small_number = [&] { return static_cast<float>(static_cast<int>(random() % 255) - 127) / 64; };
  const int64_t stride = (columns + 7) / 8;
  std::vector<uint8_t> mask(static_cast<size_t>(rows * stride));
  std::vector<float> values, dense(static_cast<size_t>(rows * columns));
  std::uniform_real_distribution<double> uniform(0, 1);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < columns; ++k) {
      if (uniform(random) < zeros) continue;
      const float value = small_number();
      mask[static_cast<size_t>(r * stride + k / 8)] |= static_cast<uint8_t>(1 << k % 8);
      dense[static_cast<size_t>(r * columns + k)] = value;
      values.push_back(value);
    }
  }
  const int64_t of_part = rows / parts;
  std::vector<float> U(static_cast<size_t>(rows * rank)), V(static_cast<size_t>(parts * rank * columns));
  for (std::vector<float>* numbers : {&U, &V})
    for (float& v : *numbers) v = small_number();
  std::vector<uint16_t> halves, U_halves, V_halves;
  for (const float v : values) halves.push_back(to_half(v));
  for (const float v : U) U_halves.push_back(to_half(v));
  for (const float v : V) V_halves.push_back(to_half(v));
  std::vector<float> x(static_cast<size_t>(tokens * columns)), y(static_cast<size_t>(tokens * rows), NAN);
  std::vector<float> bias(static_cast<size_t>(rows));
  for (std::vector<float>* numbers : {&x, &bias})
    for (float& v : *numbers) v = static_cast<float>(uniform(random) * 2 - 1);

  std::vector<bool> special(static_cast<size_t>(tokens));
  for (int64_t t = 0; t < tokens; ++t) {
    if (random() % 4) continue;
    const float numbers[] = {INFINITY, -INFINITY, NAN, -NAN};
    special[static_cast<size_t>(t)] = true;
    x[static_cast<size_t>(t * columns + random() % columns)] = numbers[random() % 4];
  }

  const auto stored = [&](const std::vector<float>& floats, const std::vector<uint16_t>& bits) {
    return half ? static_cast<const void*>(bits.data()) : floats.data();
  };
  const vitoats::SparseMatrix S{rows, columns, stride, mask.data(), static_cast<int64_t>(values.size()), stored(values, halves)};
  const vitoats::Weights weights{kernels.value_type, S, {parts, rank, stored(U, U_halves), stored(V, V_halves)}};
  const vitoats::Output output{y.data(), with_bias ? bias.data() : nullptr};
  std::feclearexcept(FE_ALL_EXCEPT);
  std::feraiseexcept(FE_INEXACT);
  vitoats::Product(weights, kernels).run(x.data(), tokens, output, Serial());
  volatile float tiny = std::numeric_limits<float>::min();
  if (std::fetestexcept(FE_ALL_EXCEPT) != FE_INEXACT || tiny / 2 == 0) {
    std::printf("%s: the floating-point state has changed\n", kernels.isa);
    return 1;
  }
  std::vector<double> z(static_cast<size_t>(parts * rank)), z_size(z.size());
  for (int64_t t = 0; t < tokens; ++t) {
    if (special[static_cast<size_t>(t)]) {
      for (int64_t r = 0; r < rows; ++r)
        if (!std::isnan(y[static_cast<size_t>(t * rows + r)])) return report(kernels, rows, columns, tokens, t, r, y, NAN);
      continue;
    }
    for (size_t i = 0; i < z.size(); ++i) {
      z[i] = z_size[i] = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const double v = V[i * static_cast<size_t>(columns) + static_cast<size_t>(k)];
        const double product = v * x[static_cast<size_t>(t * columns + k)];
        z[i] += product;
        z_size[i] += std::fabs(product);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      double sum = with_bias ? bias[static_cast<size_t>(r)] : 0, size = 0;
      for (int64_t i = 0; i < rank; ++i) {
        const double u = U[static_cast<size_t>(r * rank + i)];
        const auto at = static_cast<size_t>(r / of_part * rank + i);
        sum += u * z[at];
        size += std::fabs(u) * z_size[at];
      }
      for (int64_t k = 0; k < columns; ++k) {
        const double s = dense[static_cast<size_t>(r * columns + k)];
        const double product = s * x[static_cast<size_t>(t * columns + k)];
        sum += product;
        size += std::fabs(product);
      }
      const double found = y[static_cast<size_t>(t * rows + r)];
      if (!(std::fabs(found - sum) <= 1e-5 * size + 1e-6 * std::fabs(sum)))
        return report(kernels, rows, columns, tokens, t, r, y, sum);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0);
  const double zeros[] = {0, 0.3, 0.5, 0.625, 0.75, 0.9, 1};
  int failed = 0, done = 0;
  for (const char* const* isa = vitoats::supported_isas(); *isa; ++isa)
    for (int i = 0; i < cases; ++i, ++done) {
      const int64_t parts = 1 + random() % (i % 11 ? 3 : 200), rank = i % 4 ? random() % 20 : random() % 150;
      const int64_t rows = parts * (1 + random() % (parts > 3 ? 3 : i % 7 ? 20 : 150)), columns = 1 + random() % (i % 5 ? 150 : 400);
      const int64_t tokens = i % 3 ? 1 + random() % 20 : random() % 260;
      const auto type = i % 2 ? vitoats::ValueType::kFloat16 : vitoats::ValueType::kFloat32;
      failed += check(vitoats::float_row(type, *isa), random, rows, columns, tokens, zeros[random() % 7], random() % 2, parts, rank);
    }
  std::printf("%d passed, %d failed\n", done - failed, failed);
  return failed != 0;
}
