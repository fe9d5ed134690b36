#include "int8_avx512.h"

namespace vitoats {

extern const Int8Kernels kInt8Avx512Vnni = int8_kernels<Vnni512>("avx512_vnni");

}  // namespace vitoats
