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
//
// A tile that is stored right after its last product holds everything up. So the sums stay in their tiles, and each is stored
// just before the next product needs its tile.
template <>
class BlockProduct<Amx> {
 public:
  static int64_t steps(int64_t quads) { return divide_up(quads, kStepQuads); }

  template <class SideWork>
  void run(const uint8_t* x, int64_t stride, int64_t count, const int8_t* w0, const int8_t* w1, int64_t quads, int32_t* sums,
           SideWork&& side_work) {
    amx::fence();
    if (count > amx::kRows) {
      w0 == w1 ? product<2, 1>(x, stride, w0, w1, quads, side_work) : product<2, 2>(x, stride, w0, w1, quads, side_work);
    } else {
      w0 == w1 ? product<1, 1>(x, stride, w0, w1, quads, side_work) : product<1, 2>(x, stride, w0, w1, quads, side_work);
    }
    pending_ = sums;
    pending_lower_ = count > amx::kRows;
  }

  void finish() {
    renew<0, 1>();
    renew<2, 3>();
    pending_ = nullptr;
  }

 private:
  template <int token_tiles, int strips, class SideWork>
  VITOATS_INLINE void product(const uint8_t* x, int64_t stride, const int8_t* w0, const int8_t* w1, int64_t quads,
                              SideWork&& side_work) {
    const int64_t end = steps(quads);
    step<token_tiles, strips, true>(x, stride, w0, w1);
    side_work();
    for (int64_t i = 1; i < end; ++i) {
      step<token_tiles, strips, false>(x + i * amx::kRowBytes, stride, w0 + i * kStepBytes, w1 + i * kStepBytes);
      side_work();
    }
  }

  template <int token_tiles, int strips, bool first>
  VITOATS_INLINE void step(const uint8_t* x, int64_t stride, const int8_t* w0, const int8_t* w1) const {
    amx::stream_unordered<4>(x, stride);
    amx::load_unordered<6>(w0, kQuadBytes);
    if constexpr (strips > 1) amx::load_unordered<7>(w1, kQuadBytes);
    if constexpr (first) renew<0, 1>();
    amx::dpbusd<0, 4, 6>();
    if constexpr (strips > 1) amx::dpbusd<1, 4, 7>();
    if constexpr (token_tiles > 1) amx::stream_unordered<5>(x + amx::kRows * stride, stride);
    if constexpr (first) renew<2, 3>();
    if constexpr (token_tiles > 1) {
      amx::dpbusd<2, 5, 6>();
      if constexpr (strips > 1) amx::dpbusd<3, 5, 7>();
    }
  }

  // Stores the sums in two tiles, those of one tile of tokens, and clears them.
  template <int a, int b>
  VITOATS_INLINE void renew() const {
    constexpr int64_t row = kPanelRows * sizeof(int32_t);
    if (pending_ && (a == 0 || pending_lower_)) {
      int32_t* sums = pending_ + a / 2 * amx::kRows * kPanelRows;
      amx::store<a>(sums, row);
      amx::store<b>(sums + kStripRows, row);
    }
    amx::zero<a>();
    amx::zero<b>();
  }

  static constexpr int64_t kStepBytes = kStepQuads * kQuadBytes;

  int32_t* pending_ = nullptr;   // where the sums in the tiles belong
  bool pending_lower_ = false;   // whether there is a second tile of tokens
};

}  // namespace

extern const Int8Kernels kInt8Amx = int8_kernels<Amx>("amx");

bool amx_available() { return amx::available(); }

}  // namespace vitoats
