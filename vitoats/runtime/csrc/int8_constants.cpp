#include "int8_constants.h"

namespace vitoats {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Checks the constants of a product. The result points to ONNX Runtime's memory.
class Checks {
 public:
  Checks(const NodeInputs& inputs, const Int8Form& form) : inputs_(inputs), form_(form) {}

  Int8Constants constants(const char* in_features) {
    Int8Constants found{};
    found.columns = inputs_.integer(in_features);
    if (found.columns > kMaxInt8Columns)
      refuse(std::string(in_features) + " is " + std::to_string(found.columns) + "; int8 products take at most " + std::to_string(kMaxInt8Columns));
    found.scale = floats(form_.scale(), "scale", {}, &found.rows);
    found.bias = floats(form_.bias(), "bias", {found.rows});
    found.activation = form_.gelu ? Activation::kGelu : Activation::kNone;
    if (form_.layer_norm) {
      found.norm = {floats(1, "norm_weight", {found.columns}), floats(2, "norm_bias", {found.columns}), inputs_.number("epsilon")};
      if (found.norm.epsilon < 0) refuse("epsilon is negative");
    }
    const int64_t strips = ceil_div(found.rows, kStripRows), quads = ceil_div(found.columns, kQuad);
    found.parts = 1;
    if (!form_.sparse) {
      found.values = bytes(form_.first_weight(), "weight", {strips, quads, kStripRows, kQuad});
      return found;
    }
    sparse(found, strips, quads);
    low_rank(found, strips, quads);
    return found;
  }

 private:
  const float* floats(size_t input, const char* name, const Dimensions& expected, int64_t* size = nullptr) const {
    const Tensor tensor = inputs_.constant(input, name);
    const Dimensions& found = tensor.dimensions();
    if (tensor.type() != ort::kFloat) refuse(std::string(name) + " is not float");
    if (size ? found.size() != 1 || found[0] < 1 : found != expected)
      refuse(std::string(name) + " has shape " + text(found) + ", not " + (size ? "[out_features]" : text(expected)));
    if (size) *size = found[0];
    const auto* data = tensor.data<const float>();
    if (!all_finite(ValueType::kFloat32, data, elements(found.begin(), found.end())))
      refuse("a number of " + std::string(name) + " is infinite or NaN");
    return data;
  }

  Tensor int8(size_t input, const char* name) const {
    Tensor tensor = inputs_.constant(input, name);
    if (tensor.type() != ort::kInt8) refuse(std::string(name) + " is not int8");
    return tensor;
  }

  const int8_t* bytes(size_t input, const char* name, const Dimensions& expected) const {
    const Tensor tensor = int8(input, name);
    if (tensor.dimensions() != expected)
      refuse(std::string(name) + " has shape " + text(tensor.dimensions()) + ", not " + text(expected));
    return tensor.data<const int8_t>();
  }

  void sparse(Int8Constants& found, int64_t strips, int64_t quads) const {
    const Tensor values = int8(form_.first_weight(), "values"), mask = inputs_.constant(form_.first_weight() + 1, "mask");
    if (mask.type() != ort::kUint8) refuse("the mask is not uint8");
    if (values.dimensions().size() != 1) refuse("values have shape " + text(values.dimensions()) + ", not [nnz]");
    if (mask.dimensions() != Dimensions{strips, quads, 8})
      refuse("the mask has shape " + text(mask.dimensions()) + ", not " + text({strips, quads, 8}));
    found.mask = mask.data<const uint8_t>();
    found.values = values.data<const int8_t>();
    found.n_values = values.dimensions()[0];
    int64_t bits = 0;
    for (int64_t i = 0; i < strips * quads * 8; ++i) bits += __builtin_popcount(found.mask[i]);
    if (bits != found.n_values)
      refuse("the mask has " + std::to_string(bits) + " bits set for " + std::to_string(found.n_values) + " values");
  }

  void low_rank(Int8Constants& found, int64_t strips, int64_t quads) const {
    const size_t at = form_.bias() + 1;
    const Tensor V_scale = inputs_.constant(at + 3, "V_scale");
    const Dimensions& found_rank = V_scale.dimensions();
    if (found_rank.size() != 2 || found_rank[0] < 1 || found_rank[1] < 1 || found_rank[1] > kMaxInt8Columns)
      refuse("V_scale has shape " + text(found_rank) + ", not [parts, rank]");
    found.parts = found_rank[0];
    found.rank = found_rank[1];
    if (found.parts > 1 && (found.rows % found.parts || found.rows / found.parts % kStripRows))
      refuse(std::to_string(found.rows) + " outputs are not " + std::to_string(found.parts) + " equal parts of a multiple of 16");
    found.U = bytes(at, "U", {strips, ceil_div(found.rank, kQuad), kStripRows, kQuad});
    found.U_scale = floats(at + 1, "U_scale", {found.rows});
    found.V = bytes(at + 2, "V", {found.parts, ceil_div(found.rank, kStripRows), quads, kStripRows, kQuad});
    found.V_scale = floats(at + 3, "V_scale", found_rank);
  }

  const NodeInputs& inputs_;
  const Int8Form& form_;
};

}  // namespace

Int8Constants checked_int8_constants(const NodeInputs& inputs, const Int8Form& form, const char* in_features) {
  return Checks(inputs, form).constants(in_features);
}

void check_count(const NodeInputs& inputs, size_t expected) {
  if (inputs.count() != expected)
    refuse("there are " + std::to_string(inputs.count()) + " inputs, not " + std::to_string(expected));
}

}  // namespace vitoats
