// How 8 bytes are expanded where no instruction does it.
#pragma once

#include <cstdint>

namespace vitoats {
namespace {

// For each 8-bit mask, the packed byte that each byte takes; 255 gives zero.
struct ExpandTable {
  alignas(8) uint8_t byte[256][8];
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table{};
  for (int bits = 0; bits < 256; ++bits)
    for (int i = 0, next = 0; i < 8; ++i) table.byte[bits][i] = static_cast<uint8_t>(bits >> i & 1 ? next++ : 255);
  return table;
}

constexpr ExpandTable kExpand = make_expand_table();

}  // namespace
}  // namespace vitoats
