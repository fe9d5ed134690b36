// AVX2: vpmaddubsw multiplies 32 bytes at once, but the sum of the two products of a pair saturates at 16 bits. It cannot where the
// weights of a pair sum up to 128 at most (255 * 128 < 2^15) and to -128 at least, or differ in sign. Of any other pair, one weight
// is multiplied apart. Such pairs are rare: the largest weight of a row is 127, so most are small.
#include "int8_avx2.h"

namespace vitoats {
namespace {

struct Avx2 : Avx2Engine {
  static constexpr int kRegisterTokens = 5, kTokens = 20 * kRegisterTokens;  // they share the search for such pairs

  // For any weights: the bytes with an even and those with an odd index are widened to 16 bits where they are.
  static VITOATS_INLINE Sums dot(Sums s, const uint8_t* x, Weights w) {
    const __m256i bytes = broadcast(x), even = _mm256_and_si256(bytes, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(bytes, 8);
    return {dot_8(s.low, even, odd, w.low), dot_8(s.high, even, odd, w.high)};
  }

 private:
  static VITOATS_INLINE __m256i dot_8(__m256i sums, __m256i even, __m256i odd, __m256i w) {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8)));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(odd, _mm256_srai_epi16(w, 8)));
  }
};

// Some quads of a strip, and behind each that has pairs which might saturate, a second one with a weight of each of those.
class FittingWeights {
 public:
  static constexpr int64_t kSomeQuads = 128;

  FittingWeights(const int8_t* w, int64_t quads) {
    for (int64_t quad = 0; quad < quads; ++quad, w += kQuadBytes) {
      const Avx2::Weights all = Avx2::load(w), apart = {apart_of(all.low), apart_of(all.high)};
      put(0, quad, {_mm256_xor_si256(all.low, apart.low), _mm256_xor_si256(all.high, apart.high)});
      put(1, quad, apart);
      const __m256i any = _mm256_or_si256(apart.low, apart.high);
      count_ += 2 - _mm256_testz_si256(any, any);
    }
  }

  // Adds the products with some tokens to their sums.
  template <int tokens>
  VITOATS_NOINLINE void multiply(const uint8_t* x, int64_t stride, int32_t* sums) const {
    Avx2::Sums s[tokens];
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) s[t] = {Avx2::load_bytes(sums + t * kPanelRows), Avx2::load_bytes(sums + t * kPanelRows + 8)};
    const __m256i one = _mm256_set1_epi16(1);
    const int8_t* w = weights_;
    for (const int32_t *at = at_, *end = at_ + count_; at < end; ++at, w += kQuadBytes) {
      const Avx2::Weights weights = Avx2::load(w);
      const uint8_t* quad = x + *at;
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) {
        const __m256i bytes = Avx2::broadcast(quad + t * stride);
        s[t].low = _mm256_add_epi32(s[t].low, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, weights.low), one));
        s[t].high = _mm256_add_epi32(s[t].high, _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, weights.high), one));
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < tokens; ++t) Avx2::store_sums(sums + t * kPanelRows, s[t]);
  }

 private:
  // The odd weights of pairs that might saturate; other weights are zero.
  static VITOATS_INLINE __m256i apart_of(__m256i w) {
    const __m256i sums = _mm256_abs_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), w));
    const __m256i odd = _mm256_set1_epi16(static_cast<int16_t>(0xff00));
    return _mm256_and_si256(_mm256_and_si256(w, odd), _mm256_cmpgt_epi16(sums, _mm256_set1_epi16(128)));
  }

  VITOATS_INLINE void put(int64_t i, int64_t quad, Avx2::Weights w) {
    Avx2::store(weights_ + (count_ + i) * kQuadBytes, w);
    at_[count_ + i] = static_cast<int32_t>(quad * kQuad);
  }

  int64_t count_ = 0;
  int32_t at_[2 * kSomeQuads];  // where their inputs are
  alignas(64) int8_t weights_[2 * kSomeQuads * kQuadBytes];
};

template <>
struct BlockProduct<Avx2> {
  static int64_t steps(int64_t) { return 1; }
  void finish() {}

  template <class SideWork>
  void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
           SideWork&& side_work) {
    side_work();
    for (int64_t t = 0; t < count; ++t) std::memset(sums + t * kPanelRows, 0, kPanelRows * sizeof(int32_t));
    for (int64_t quad = 0; quad < quads; quad += FittingWeights::kSomeQuads) {
      const int64_t n = smaller(FittingWeights::kSomeQuads, quads - quad);
      strip(x + quad * kQuad, stride, count, FittingWeights(w0 + quad * kQuadBytes, n), sums);
      if (w1 != w0) strip(x + quad * kQuad, stride, count, FittingWeights(w1 + quad * kQuadBytes, n), sums + kStripRows);
    }
  }

 private:
  static void strip(const uint8_t* x, int64_t stride, int64_t count, const FittingWeights& w, int32_t* sums) {
    for (int64_t t = 0; t < count; t += Avx2::kRegisterTokens)
      of_count<Avx2::kRegisterTokens>(smaller(Avx2::kRegisterTokens, count - t), w, x + t * stride, stride, sums + t * kPanelRows);
  }

  template <int tokens>
  static VITOATS_INLINE void of_count(int64_t count, const FittingWeights& w, const uint8_t* x, int64_t stride, int32_t* sums) {
    if constexpr (tokens > 0) {
      if (count == tokens)
        w.multiply<tokens>(x, stride, sums);
      else
        of_count<tokens - 1>(count, w, x, stride, sums);
    }
  }
};

}  // namespace

extern const Int8Kernels kInt8Avx2 = int8_kernels<Avx2>("avx2");

}  // namespace vitoats
