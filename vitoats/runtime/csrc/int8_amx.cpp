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

// Two tiles of tokens by two strips. All tiles are whole: x is padded with zeros to whole steps, and rows of tokens that do not
// exist are computed and ignored.
template <>
struct BlockProduct<Amx> {
  static int64_t steps(int64_t quads) { return divide_up(quads, kStepQuads); }

  template <class SideWork>
  static void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
                  SideWork&& side_work) {
    constexpr int64_t row = kPanelRows * sizeof(int32_t), step_bytes = kStepQuads * kQuadBytes, half = amx::kRows;
    const int64_t end = steps(quads);
    amx::zero<0>();
    amx::zero<1>();
    if (count <= half) {
      for (int64_t i = 0; i < end; ++i) {
        amx::load<4>(x + i * amx::kRowBytes, stride);
        amx::load<6>(w0 + i * step_bytes, kQuadBytes);
        amx::dpbusd<0, 4, 6>();
        amx::load<7>(w1 + i * step_bytes, kQuadBytes);
        amx::dpbusd<1, 4, 7>();
        side_work();
      }
    } else {
      amx::zero<2>();
      amx::zero<3>();
      for (int64_t i = 0; i < end; ++i) {
        amx::load<4>(x + i * amx::kRowBytes, stride);
        amx::load<6>(w0 + i * step_bytes, kQuadBytes);
        amx::dpbusd<0, 4, 6>();
        amx::load<7>(w1 + i * step_bytes, kQuadBytes);
        amx::dpbusd<1, 4, 7>();
        amx::load<5>(x + half * stride + i * amx::kRowBytes, stride);
        amx::dpbusd<2, 5, 6>();
        amx::dpbusd<3, 5, 7>();
        side_work();
      }
      amx::store<2>(sums + half * kPanelRows, row);
      amx::store<3>(sums + half * kPanelRows + kStripRows, row);
    }
    amx::store<0>(sums, row);
    amx::store<1>(sums + kStripRows, row);
  }
};

}  // namespace

extern const Int8Kernels kInt8Amx = int8_kernels<Amx>("amx");

bool amx_available() { return amx::available(); }

}  // namespace vitoats
