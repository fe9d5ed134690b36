// Attention with products in bfloat16 by AMX: sums of 2 x 2 tiles.
#include "amx.h"
#include "attend.h"
#include "bfloat16.h"

namespace vitoats {
namespace {

// c [16 R, vectors] = a [16 R, steps] b, by blocks of 16 R rows and 16 or 32 columns. Tiles 0 to 3 are the sums of a block, row by
// row; 4 and 5 belong to a, 6 and 7 to b. Storing tiles takes long, but overlaps with products if it is in their midst: the sums
// of a block are stored where the next block begins with the same tile.
struct TileProduct {
  const float* a;
  int64_t a_stride;
  const float* b;                // panels
  int64_t steps, vectors;
  float* c;
  int64_t c_stride;

  template <int R>
  VITOATS_INLINE void compute() const {
    float* unsaved = nullptr;
    for (int64_t vector = 0; vector < vectors; vector += 2) {
      const int64_t panel = vector / 4 * 4, lanes = smaller(4, vectors - panel) * 16;
      const float* right = b + panel * 16 * steps + (vector - panel) * 16;
      float* sums = c + vector * 16;
      if (vector + 1 == vectors) {
        block<R, 1>(right, lanes, unsaved);
        if (unsaved) save<1>(unsaved);
        if (unsaved && R > 1) save<3>(unsaved);
        save<0>(sums);
        if (R > 1) save<2>(sums);
        return;
      }
      block<R, 2>(right, lanes, unsaved);
      unsaved = sums;
    }
    save<0>(unsaved);
    save<1>(unsaved);
    if (R > 1) save<2>(unsaved);
    if (R > 1) save<3>(unsaved);
  }

 private:
  template <int R, int C>
  VITOATS_INLINE void block(const float* right, int64_t lanes, float* unsaved) const {
    step<R, C, true>(a, right, lanes, unsaved);
    for (int64_t s = 16; s < steps; s += 16) step<R, C, false>(a + s, right + s * lanes, lanes, unsaved);
  }

  template <int R, int C, bool first>
  VITOATS_INLINE void step(const float* left, const float* right, int64_t lanes, float* unsaved) const {
    amx::load<4>(left, a_stride * 4);
    amx::load<6>(right, lanes * 4);
    if (first) begin<0>(unsaved);
    amx::dpbf16ps<0, 4, 6>();
    if (C > 1) {
      amx::load<7>(right + 16, lanes * 4);
      if (first) begin<1>(unsaved);
      amx::dpbf16ps<1, 4, 7>();
    }
    if (R > 1) {
      amx::load<5>(left + 16 * a_stride, a_stride * 4);
      if (first) begin<2>(unsaved);
      amx::dpbf16ps<2, 5, 6>();
    }
    if (R > 1 && C > 1) {
      if (first) begin<3>(unsaved);
      amx::dpbf16ps<3, 5, 7>();
    }
  }

  template <int tile>
  VITOATS_INLINE void begin(float* unsaved) const {
    if (unsaved) save<tile>(unsaved);
    amx::zero<tile>();
  }

  template <int tile>
  VITOATS_INLINE void save(float* sums) const {
    amx::store<tile>(sums + tile / 2 * 16 * c_stride + tile % 2 * 16, c_stride * 4);
  }
};

struct Amx {
  using V = Vector;
  static constexpr int kSteps = 2, kStepGroup = 16, kQueries = 2 * amx::kRows, kDegree = 3;

  struct Context {
    amx::Tiles tiles{amx::Configuration::whole()};
  };

  static VITOATS_INLINE __m512 pack(__m512 first, __m512 second) { return bfloat16::pack(first, second); }
  static VITOATS_INLINE __m512 interleave(__m512 first, __m512 second) { return bfloat16::interleave(first, second); }

  static VITOATS_INLINE void multiply(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t vectors, int64_t steps,
                                      float* c, int64_t c_stride) {
    const TileProduct product{a, a_stride, b, steps, vectors, c, c_stride};
    if (rows > amx::kRows) {
      product.compute<2>();
    } else {
      product.compute<1>();
    }
  }
};

}  // namespace

extern const AttentionKernels kAttentionAmx = attention::kernels<Amx>("amx");

}  // namespace vitoats
