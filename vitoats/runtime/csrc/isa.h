// The instruction sets of this processor, and the choice of kernels among them.
#pragma once

#include <cstring>

namespace vitoats {

// Those that this processor supports, best first, terminated by nullptr: amx, avx512_vnni, avx512, avx_vnni, avx2; neon_i8mm,
// neon_dotprod, neon; and portable. A processor that supports one supports all that follow, except for avx_vnni.
const char* const* supported_isas();

// The one that the environment variable VITOATS_ISA names, else the best; nullptr if the variable names none of them.
const char* chosen_isa();

// The row of a kernel table for an instruction set: its own, or that of the next best one that has a row. The table is terminated
// by nullptr and has a row for portable.
template <class Row, class Matches>
const Row* best_row(const Row* const* table, const char* isa, const Matches& matches) {
  const char* const* name = supported_isas();
  while (std::strcmp(*name, isa)) ++name;
  for (; *name; ++name)
    for (const Row* const* row = table; *row; ++row)
      if (!std::strcmp((*row)->isa, *name) && matches(**row)) return *row;
  return nullptr;
}

}  // namespace vitoats
