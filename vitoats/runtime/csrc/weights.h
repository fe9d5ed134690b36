// The constants of a node, in the model's memory: y = x (S + U V)^T + bias.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace vitoats {

enum class ValueType { kFloat32, kFloat16 };

constexpr size_t size_of(ValueType type) { return type == ValueType::kFloat16 ? 2 : 4; }

struct SparseMatrix {
  int64_t rows, columns;
  int64_t mask_stride;          // bytes in a row of the mask, ceil(columns / 8)
  const uint8_t* mask;          // [rows, mask_stride], least significant bit first, zero past the last column
  int64_t n_values;             // number of bits set in the mask
  const void* values;           // in row order
};

// A separate U V for each of equal parts of S's rows; a fused qkv has three. Rank 0 means no low-rank term.
struct LowRank {
  int64_t parts, rank;          // rank of each part
  const void* U;                // [parts, rows / parts, rank]
  const void* V;                // [parts, rank, columns]
};

struct Weights {
  ValueType type;               // of the values of S, U and V
  SparseMatrix S;
  LowRank low_rank;

  int64_t z_rows() const { return low_rank.parts * low_rank.rank; }  // of z = V x, all parts
};

// True without infinities and NaN, which have all exponent bits set. There is no early exit, so that the loop is vectorized.
template <class Bits>
bool finite_bits(const void* numbers, int64_t n, Bits exponent) {
  const auto* bytes = static_cast<const unsigned char*>(numbers);
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + static_cast<size_t>(i) * sizeof bits, sizeof bits);
    found |= (bits & exponent) == exponent;
  }
  return !found;
}

inline bool all_finite(ValueType type, const void* numbers, int64_t n) {
  return type == ValueType::kFloat16 ? finite_bits<uint16_t>(numbers, n, 0x7c00) : finite_bits<uint32_t>(numbers, n, 0x7f800000);
}

}  // namespace vitoats
