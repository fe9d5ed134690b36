// AMX: eight tile registers of 16 rows of 64 bytes, and products of tiles. Their configuration belongs to the thread, and other
// libraries set their own: hold a Tiles for as long as tiles are used, within one task.
//
// VITOATS_EMULATE_AMX replaces the instructions by plain C++, so that kernels are tested on processors without them, and under
// sanitizers, which do not see what a tile instruction reads and writes.
//
// All of this has internal linkage, like simd.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include "x86.h"
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace vitoats {
namespace {
namespace amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// The operand of ldtilecfg. A product c += a b wants rows(a) = rows(c), row_bytes(b) = row_bytes(c), 4 rows(b) = row_bytes(a).
struct Configuration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // The first n tiles are whole.
  static Configuration whole(int n = kTiles) {
    Configuration configuration;
    for (int i = 0; i < n; ++i) configuration.set(i, kRows, kRowBytes);
    return configuration;
  }

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(Configuration) == 64);

#if defined(VITOATS_EMULATE_AMX)

inline bool available() { return true; }

struct State {
  Configuration configuration;
  uint8_t data[kTiles][kRows][kRowBytes];
};
inline thread_local State state;

class Tiles {
 public:
  explicit Tiles(const Configuration& configuration) { state = {configuration, {}}; }
  Tiles(const Tiles&) = delete;
  ~Tiles() { state = {}; }
};

template <int tile>
void load(const void* source, int64_t stride) {
  std::memset(state.data[tile], 0, sizeof state.data[tile]);
  for (int i = 0; i < state.configuration.rows[tile]; ++i)
    std::memcpy(state.data[tile][i], static_cast<const char*>(source) + i * stride, state.configuration.row_bytes[tile]);
}

template <int tile>
void load_unordered(const void* source, int64_t stride) {
  load<tile>(source, stride);
}

template <int tile>
void stream_unordered(const void* source, int64_t stride) {
  load<tile>(source, stride);
}

inline void fence() {}

template <int tile>
void store(void* target, int64_t stride) {
  for (int i = 0; i < state.configuration.rows[tile]; ++i)
    std::memcpy(static_cast<char*>(target) + i * stride, state.data[tile][i], state.configuration.row_bytes[tile]);
}

template <int tile>
void zero() {
  std::memset(state.data[tile], 0, sizeof state.data[tile]);
}

// c[m, n] += the sum over k of product(a[m, k], b[k, n]), where the elements of all three have 4 bytes.
template <int c, int a, int b, class Sum, class Product>
void multiply(const Product& product) {
  const Configuration& configuration = state.configuration;
  for (int m = 0; m < configuration.rows[c]; ++m)
    for (int n = 0; n < configuration.row_bytes[c] / 4; ++n) {
      Sum sum;
      std::memcpy(&sum, state.data[c][m] + 4 * n, sizeof sum);
      for (int k = 0; k < configuration.row_bytes[a] / 4; ++k) sum += product(state.data[a][m] + 4 * k, state.data[b][k] + 4 * n);
      std::memcpy(state.data[c][m] + 4 * n, &sum, sizeof sum);
    }
}

template <int c, int a, int b>
void dpbf16ps() {
  multiply<c, a, b, float>([](const uint8_t* x, const uint8_t* y) {
    float sum = 0;
    for (int i = 0; i < 4; i += 2) {
      uint32_t x_bits = 0, y_bits = 0;
      std::memcpy(reinterpret_cast<uint8_t*>(&x_bits) + 2, x + i, 2);
      std::memcpy(reinterpret_cast<uint8_t*>(&y_bits) + 2, y + i, 2);
      float x_value, y_value;
      std::memcpy(&x_value, &x_bits, 4);
      std::memcpy(&y_value, &y_bits, 4);
      sum += x_value * y_value;
    }
    return sum;
  });
}

template <int c, int a, int b>
void dpbusd() {
  multiply<c, a, b, uint32_t>([](const uint8_t* x, const uint8_t* y) {
    int32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += x[i] * static_cast<int8_t>(y[i]);
    return static_cast<uint32_t>(sum);
  });
}

#elif defined(__x86_64__)

// Whether the processor has AMX with int8 and bfloat16, and the system lets this process use it. Linux wants to be asked; the
// permission then holds for all threads. Other systems are not known to hand it out.
inline bool available() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return has_amx() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Configures the tiles of this thread, with zeros in them, and gives them back.
class Tiles {
 public:
  explicit Tiles(const Configuration& configuration) { asm volatile("ldtilecfg %0" ::"m"(configuration)); }
  Tiles(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
};

// Assembler, since GCC's intrinsics take the number of a tile only as a literal.
#define VITOATS_TILE inline __attribute__((always_inline))

// Rows that are stride bytes apart.
template <int tile>
VITOATS_TILE void load(const void* source, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(tile) : "memory");
}

// The same, but the compiler may move other accesses to memory across it, up to the next fence or store.
template <int tile>
VITOATS_TILE void load_unordered(const void* source, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(tile));
}

// The same for rows that are read once: they shall not displace others in the first-level cache.
template <int tile>
VITOATS_TILE void stream_unordered(const void* source, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(tile));
}

VITOATS_TILE void fence() { asm volatile("" ::: "memory"); }

template <int tile>
VITOATS_TILE void store(void* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
VITOATS_TILE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// c float32 [m, n] += a bfloat16 [m, 2 k] b bfloat16 [k, n, 2]
template <int c, int a, int b>
VITOATS_TILE void dpbf16ps() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// c int32 [m, n] += a uint8 [m, 4 k] b int8 [k, n, 4]
template <int c, int a, int b>
VITOATS_TILE void dpbusd() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#undef VITOATS_TILE

#else

inline bool available() { return false; }

#endif

}  // namespace amx
}  // namespace
}  // namespace vitoats
