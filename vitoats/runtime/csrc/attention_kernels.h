// The table of attention kernels: a row for each instruction set and type of the products.
//
// Keys and values of a head are packed first: copied in the layouts that the products read. Then blocks of queries attend to all
// keys, independently of each other.
#pragma once

#include <cstdint>

#include "activations.h"

namespace vitoats {

// One head of one image: y = softmax(scale q k^T) v.
struct Head {
  Activations q, k, v;           // [tokens, width], rows stride numbers apart; in bfloat16 only for kernels that multiply in it
  float* y;                      // [tokens, width], rows y_stride floats apart
  int64_t tokens, width, stride, y_stride;
  float scale;
};

enum class HeadPart { kKeys, kValues };

struct AttentionKernels {
  const char* isa;
  bool bfloat16;                 // the products are in bfloat16, with sums in float32
  int64_t queries;               // in a block

  // Floats that a packed head takes, a whole number of 64 bytes.
  int64_t (*packed_size)(const Head& head);
  // Packs one part; each writes its own part of packed.
  void (*pack)(const Head& head, HeadPart part, float* packed);
  // y[query..query_end); query is a multiple of queries. packed has room for the packed queries, too.
  void (*attend)(const Head& head, float* packed, int64_t query, int64_t query_end);
};

// The best row for an instruction set that this processor supports (isa.h), with products in bfloat16 only if they are allowed.
const AttentionKernels& attention_row(bool bfloat16, const char* isa);

}  // namespace vitoats
