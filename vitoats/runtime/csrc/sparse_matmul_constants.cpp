#include "sparse_matmul_constants.h"

#include "node_inputs.h"

namespace vitoats {
namespace {

void check_finite(const Tensor& numbers, ValueType type, const char* name) {
  const Dimensions& d = numbers.dimensions();
  if (!all_finite(type, numbers.data<void>(), elements(d.begin(), d.end()))) refuse(std::string(name) + " is infinite or NaN");
}

ValueType checked_type(const Tensor& values) {
  if (values.type() == ort::kFloat) return ValueType::kFloat32;
  if (values.type() == ort::kFloat16) return ValueType::kFloat16;
  refuse("values are neither float nor float16");
}

// The mask must have as many bits set as there are values, and none past the last column.
void check_mask_bits(const SparseMatrix& S) {
  const int used = static_cast<int>(S.columns % 8);
  int64_t bits = 0;
  for (int64_t row = 0; row < S.rows; ++row) {
    const uint8_t* bytes = S.mask + row * S.mask_stride;
    if (used && bytes[S.mask_stride - 1] >> used) refuse("the mask has a bit past the last column");
    for (int64_t i = 0; i < S.mask_stride; ++i) bits += __builtin_popcount(bytes[i]);
  }
  if (bits != S.n_values)
    refuse("the mask has " + std::to_string(bits) + " bits set for " + std::to_string(S.n_values) + " values");
}

SparseMatrix checked_sparse(const Tensor& values, const Tensor& mask, int64_t columns) {
  if (mask.type() != ort::kUint8) refuse("the mask is not uint8");
  const int64_t stride = columns / 8 + (columns % 8 != 0);
  if (values.dimensions().size() != 1) refuse("values have shape " + text(values.dimensions()) + ", not [nnz]");
  const Dimensions& found = mask.dimensions();
  if (found.size() != 2 || found[0] < 1 || found[1] != stride)
    refuse("the mask has shape " + text(found) + ", not [out_features, " + std::to_string(stride) + "] as in_features = " +
           std::to_string(columns) + " asks for");
  const SparseMatrix S{found[0], columns, stride, mask.data<uint8_t>(), values.dimensions()[0], values.data<void>()};
  check_mask_bits(S);
  return S;
}

LowRank checked_low_rank(const NodeInputs& inputs, const Tensor& values, const SparseMatrix& S) {
  if (inputs.count() < 6) refuse("there is U without V");
  const Tensor U = inputs.constant(4, "U"), V = inputs.constant(5, "V");
  if (U.type() != values.type() || V.type() != values.type()) refuse("U and V are not of the type of values");
  const Dimensions& found = U.dimensions();
  if (found.size() != 3 || found[0] < 1 || S.rows % found[0] || found[1] != S.rows / found[0])
    refuse("U has shape " + text(found) + ", not [parts, " + std::to_string(S.rows) + " / parts, rank]");
  const Dimensions expected{found[0], found[2], S.columns};
  if (V.dimensions() != expected) refuse("V has shape " + text(V.dimensions()) + ", not " + text(expected));
  check_finite(U, checked_type(values), "a number of U");
  check_finite(V, checked_type(values), "a number of V");
  return {found[0], found[2], U.data<void>(), V.data<void>()};
}

}  // namespace

// Sizes do not overflow: each product of two of them is zero or the number of elements of a tensor in memory.
Weights checked_weights(const ort::Api& api, const OrtKernelInfo* info) {
  const NodeInputs inputs(api, info);
  const int64_t columns = inputs.integer("in_features");
  const Tensor values = inputs.constant(1, "values"), mask = inputs.constant(2, "mask");
  const ValueType type = checked_type(values);
  const SparseMatrix S = checked_sparse(values, mask, columns);
  check_finite(values, type, "a value");
  if (const OrtValue* value = inputs.find_constant(3)) {
    const Tensor bias = inputs.tensor(value);
    checked_bias(bias, S.rows);
    check_finite(bias, ValueType::kFloat32, "a number of the bias");
  }
  return {type, S, inputs.count() > 4 ? checked_low_rank(inputs, values, S) : LowRank{1, 0, nullptr, nullptr}};
}

const float* checked_bias(const Tensor& bias, int64_t rows) {
  if (bias.type() != ort::kFloat) refuse("bias is not float");
  if (bias.dimensions() != Dimensions{rows}) refuse("bias has shape " + text(bias.dimensions()) + ", not " + text({rows}));
  return bias.data<float>();
}

}  // namespace vitoats
