// Compares all attention kernels that run on this processor with double precision:
//
//   check_attention [CASES] [SEED]      random shapes. The buffers have no slack, so a sanitizer or an emulator detects any access
//                                       past their end. Some numbers are infinities or NaN, and the outputs that depend on them
//                                       must be NaN. The thread's floating-point state must be preserved.
//   check_attention time                the shortest time of the thread for some shapes of vision transformers
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <random>
#include <vector>

#include "attention.h"
#include "isa.h"

#if defined(__x86_64__)
#include "x86.h"
#endif

namespace vitoats {
#if defined(__x86_64__)
extern const AttentionKernels kAttentionBf16;
#endif
}  // namespace vitoats

namespace {

// The rows that this processor can run, each once: attention_row() leaves out those that are slow here.
std::vector<const vitoats::AttentionKernels*> rows() {
  std::vector<const vitoats::AttentionKernels*> found;
  for (const char* const* isa = vitoats::supported_isas(); *isa; ++isa)
    for (const bool bfloat16 : {true, false}) found.push_back(&vitoats::attention_row(bfloat16, *isa));
#if defined(__x86_64__)
  if (vitoats::has_avx512_bf16()) found.push_back(&vitoats::kAttentionBf16);
#endif
  std::sort(found.begin(), found.end());
  found.erase(std::unique(found.begin(), found.end()), found.end());
  return found;
}

struct Serial : vitoats::Parallel {
  void run(void (*call)(void*, size_t), size_t n, void* context) const override {
    for (size_t i = 0; i < n; ++i) call(context, i);
  }
};

struct Case {
  int64_t batch, tokens, heads, width;
  float scale;

  int64_t columns() const { return heads * width; }
  // The place of number i of token t of a head in qkv; part is 0 for q, 1 for k and 2 for v.
  size_t at(int64_t b, int64_t t, int64_t part, int64_t head, int64_t i) const {
    return static_cast<size_t>((((b * tokens + t) * 3 + part) * heads + head) * width + i);
  }
};

int report(const vitoats::AttentionKernels& kernels, const Case& c, int64_t b, int64_t t, int64_t head, int64_t i, double found,
           double expected) {
  std::printf("%s%s: %d x %d tokens, %d heads of %d, scale %g: y[%d, %d, %d, %d] = %.9g, not %.9g\n", kernels.isa,
              kernels.bfloat16 ? " (bfloat16)" : "", int(c.batch), int(c.tokens), int(c.heads), int(c.width), c.scale, int(b), int(t),
              int(head), int(i), found, expected);
  return 1;
}

// The scores of a query in double precision, and how wrong the largest may be in these kernels: the sums of the products' sizes
// times the rounding error of a product, and of the sum.
double exact_scores(const Case& c, const std::vector<float>& qkv, int64_t b, int64_t t, int64_t head, bool bfloat16,
                    std::vector<double>& scores) {
  double largest_size = 0;
  for (int64_t key = 0; key < c.tokens; ++key) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < c.width; ++i) {
      const double product = double(qkv[c.at(b, t, 0, head, i)]) * qkv[c.at(b, key, 1, head, i)] * c.scale;
      sum += product;
      size += std::fabs(product);
    }
    scores[size_t(key)] = sum;
    largest_size = std::max(largest_size, size);
  }
  return largest_size * (bfloat16 ? std::ldexp(1, -8) : std::ldexp(1, -20));
}

int compare(const vitoats::AttentionKernels& kernels, const Case& c, const std::vector<float>& qkv, const std::vector<float>& y,
            const std::vector<bool>& is_nan) {
  std::vector<double> scores(size_t(c.tokens));
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t head = 0; head < c.heads; ++head) {
        const auto place = [&](int64_t i) { return size_t(((b * c.tokens + t) * c.heads + head) * c.width + i); };
        if (is_nan[size_t((b * c.tokens + t) * c.heads + head)]) {
          for (int64_t i = 0; i < c.width; ++i)
            if (!std::isnan(y[place(i)])) return report(kernels, c, b, t, head, i, y[place(i)], NAN);
          continue;
        }
        const double score_error = exact_scores(c, qkv, b, t, head, kernels.bfloat16, scores);
        const double error = std::expm1(2 * score_error) + (kernels.bfloat16 ? std::ldexp(1, -7) : std::ldexp(1, -20));
        const double largest = *std::max_element(scores.begin(), scores.end());
        double weights = 0;
        for (double& s : scores) weights += s = std::exp(s - largest);
        for (int64_t i = 0; i < c.width; ++i) {
          double sum = 0, size = 0;
          for (int64_t key = 0; key < c.tokens; ++key) {
            const double term = scores[size_t(key)] / weights * qkv[c.at(b, key, 2, head, i)];
            sum += term;
            size += std::fabs(term);
          }
          if (!(std::fabs(y[place(i)] - sum) <= error * size + 1e-30)) return report(kernels, c, b, t, head, i, y[place(i)], sum);
        }
      }
  return 0;
}

int check(const vitoats::AttentionKernels& kernels, std::mt19937& random, const Case& c, bool special) {
  std::normal_distribution<float> normal;
  std::vector<float> qkv(size_t(c.batch * c.tokens * 3 * c.columns())), y(size_t(c.batch * c.tokens * c.columns()), 7);
  for (float& v : qkv) v = normal(random);
  std::vector<bool> is_nan(size_t(c.batch * c.tokens * c.heads));
  for (int n = special ? 1 + random() % 3 : 0; n > 0; --n) {
    const float numbers[] = {INFINITY, -INFINITY, NAN, -NAN};
    const int64_t b = random() % c.batch, t = random() % c.tokens, part = random() % 3, head = random() % c.heads;
    qkv[c.at(b, t, part, head, random() % c.width)] = numbers[random() % 4];
    for (int64_t query = 0; query < c.tokens; ++query)
      if (part || query == t) is_nan[size_t((b * c.tokens + query) * c.heads + head)] = true;
  }
  std::feclearexcept(FE_ALL_EXCEPT);
  std::feraiseexcept(FE_INEXACT);
  vitoats::Attention(c.heads, c.scale, kernels).run(qkv.data(), c.batch, c.tokens, c.width, y.data(), Serial());
  volatile float tiny = std::numeric_limits<float>::min();
  if (std::fetestexcept(FE_ALL_EXCEPT) != FE_INEXACT || tiny / 2 == 0) {
    std::printf("%s: the floating-point state has changed\n", kernels.isa);
    return 1;
  }
  return compare(kernels, c, qkv, y, is_nan);
}

double seconds_of_thread() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

void time_all() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const Case cases[] = {{1, 197, 12, 64, .125f}, {1, 261, 6, 64, .125f}, {1, 1370, 12, 64, .125f}, {1, 197, 16, 80, .1f}, {1, 197, 3, 64, .125f}};
  for (const Case& c : cases) {
    std::vector<float> qkv(size_t(c.batch * c.tokens * 3 * c.columns())), y(size_t(c.batch * c.tokens * c.columns()));
    for (float& v : qkv) v = normal(random);
    for (const vitoats::AttentionKernels* kernels : rows()) {
      const vitoats::Attention attention(c.heads, c.scale, *kernels);
      double best = 1;
      const double end = seconds_of_thread() + 1;
      for (double start; (start = seconds_of_thread()) < end; best = std::min(best, seconds_of_thread() - start))
        attention.run(qkv.data(), c.batch, c.tokens, c.width, y.data(), Serial());
      const double operations = 4. * double(c.batch * c.tokens * c.tokens * c.columns());
      std::printf("%5d tokens, %2d heads of %2d, %-12s%-11s %8.3f ms %8.1f GFLOP/s\n", int(c.tokens), int(c.heads), int(c.width),
                  kernels->isa, kernels->bfloat16 ? " (bfloat16)" : "", 1e3 * best, operations / best * 1e-9);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "time")) return time_all(), 0;
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  std::mt19937 random(argc > 2 ? unsigned(std::atoi(argv[2])) : 0);
  int failed = 0, done = 0;
  for (const vitoats::AttentionKernels* kernels : rows())
    for (int i = 0; i < cases; ++i, ++done) {
      const int64_t widths[] = {32, 64, 80, 88, 96, 128, 1 + int64_t(random() % 150)};
      const int64_t tokens = 1 + random() % (i % 10 == 0 ? 1300 : i % 3 == 0 ? 300 : 60);
      const float scales[] = {0.125f, 0.125f, 0, -1, 3};
      const int64_t batch = tokens > 300 ? 1 : 1 + random() % 3, heads = tokens > 300 ? 1 : 1 + random() % 4;
      const Case c{batch, tokens, heads, widths[random() % 7], scales[random() % 5]};
      failed += check(*kernels, random, c, random() % 4 == 0);
    }
  std::printf("%d passed, %d failed\n", done - failed, failed);
  return failed != 0;
}
