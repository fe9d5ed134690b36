// AMX: products of tiles of 16 tokens x 64 inputs with tiles of 64 inputs x 16 outputs. Everything else is AVX-512.
#include "amx.h"
#include "int8_avx512.h"

namespace vitoats {
namespace {

struct Amx : Vnni512 {
  static constexpr int kTokens = 32;
  struct Scope {
    const amx::Configuration configuration = amx::Configuration::whole();
    const amx::Tiles tiles{configuration};
  };
};

// Up to two tiles of tokens by up to two strips, of which the second may be the first again. All tiles are whole: x is padded
// with zeros to whole steps, and rows of tokens that do not exist are computed and ignored.
template <>
struct BlockProduct<Amx> {
  static int64_t steps(int64_t quads) { return divide_up(quads, kStepQuads); }

  template <class SideWork>
  static void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
                  SideWork&& side_work) {
    if (count > amx::kRows) {
      w0 == w1 ? product<2, 1>(x, stride, w0, w1, quads, sums, side_work) : product<2, 2>(x, stride, w0, w1, quads, sums, side_work);
    } else {
      w0 == w1 ? product<1, 1>(x, stride, w0, w1, quads, sums, side_work) : product<1, 2>(x, stride, w0, w1, quads, sums, side_work);
    }
  }

  template <int token_tiles, int strips, class SideWork>
  static VITOATS_INLINE void product(const uint8_t* x, int64_t stride, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
                                     SideWork&& side_work) {
    constexpr int64_t row = kPanelRows * sizeof(int32_t), below = amx::kRows * kPanelRows;
    const uint8_t* lower = x + amx::kRows * stride;
    amx::fence();
    amx::zero<0>();
    if constexpr (strips > 1) amx::zero<1>();
    if constexpr (token_tiles > 1) amx::zero<2>();
    if constexpr (token_tiles > 1 && strips > 1) amx::zero<3>();
    for (int64_t i = steps(quads); i > 0; --i) {
      amx::load_unordered<4>(x, stride);
      amx::load_unordered<6>(w0, kQuadBytes);
      amx::dpbusd<0, 4, 6>();
      if constexpr (strips > 1) {
        amx::load_unordered<7>(w1, kQuadBytes);
        amx::dpbusd<1, 4, 7>();
      }
      if constexpr (token_tiles > 1) {
        amx::load_unordered<5>(lower, stride);
        amx::dpbusd<2, 5, 6>();
        if constexpr (strips > 1) amx::dpbusd<3, 5, 7>();
      }
      x += amx::kRowBytes;
      lower += amx::kRowBytes;
      w0 += kStepQuads * kQuadBytes;
      w1 += kStepQuads * kQuadBytes;
      side_work();
    }
    amx::store<0>(sums, row);
    if constexpr (strips > 1) amx::store<1>(sums + kStripRows, row);
    if constexpr (token_tiles > 1) amx::store<2>(sums + below, row);
    if constexpr (token_tiles > 1 && strips > 1) amx::store<3>(sums + below + kStripRows, row);
  }
};

}  // namespace

extern const Int8Kernels kInt8Amx = int8_kernels<Amx>("amx");

bool amx_available() { return amx::available(); }

}  // namespace vitoats
