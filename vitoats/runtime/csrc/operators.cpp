#include "operators.h"

#include "attention_node.h"
#include "block_attention_node.h"
#include "int8_node.h"
#include "mlp_node.h"
#include "sparse_matmul_node.h"

namespace vitoats {
namespace {

OperatorKind sparse_matmul() {
  OperatorKind kind;
  kind.name = "SparseMatMul";
  kind.since_version = 1;
  kind.input_types = {ort::kFloat, ort::kAny, ort::kUint8, ort::kFloat, ort::kAny, ort::kAny};
  kind.required = 3;
  kind.create = [](const ort::Api& api, const OrtKernelInfo* info) { return std::make_unique<SparseMatMulNode>(api, info); };
  kind.last_dimension = [](const std::vector<Dimensions>& inputs) { return inputs[2].size() == 2 ? inputs[2][0] : -1; };
  return kind;
}

void add_weights(OperatorKind& kind, bool sparse) {
  const auto add = [&kind](std::initializer_list<int> types) { kind.input_types.insert(kind.input_types.end(), types); };
  add({ort::kInt8});
  if (sparse) add({ort::kUint8});
  add({ort::kFloat, ort::kFloat});
  if (sparse) add({ort::kInt8, ort::kFloat, ort::kInt8, ort::kFloat});
}

OperatorKind int8_matmul(const Int8Form& form) {
  OperatorKind kind;
  kind.name = form.name();
  kind.since_version = 2;
  kind.input_types = {ort::kFloat};
  if (form.layer_norm) kind.input_types.insert(kind.input_types.end(), {ort::kFloat, ort::kFloat});
  add_weights(kind, form.sparse);
  if (form.add) kind.input_types.push_back(ort::kFloat);
  kind.required = kind.input_types.size();
  kind.create = [form](const ort::Api& api, const OrtKernelInfo* info) { return std::make_unique<Int8Node>(api, info, form); };
  kind.last_dimension = [form](const std::vector<Dimensions>& inputs) {
    const Dimensions& scale = inputs[form.scale()];
    return scale.size() == 1 ? scale[0] : -1;
  };
  return kind;
}

OperatorKind mlp(const MlpForm& form) {
  OperatorKind kind;
  kind.name = form.name();
  kind.since_version = 3;
  kind.input_types = {ort::kFloat, ort::kFloat, ort::kFloat};
  add_weights(kind, form.first.sparse);
  add_weights(kind, form.second.sparse);
  kind.required = kind.input_types.size();
  kind.create = [form](const ort::Api& api, const OrtKernelInfo* info) { return std::make_unique<MlpNode>(api, info, form); };
  kind.last_dimension = [](const std::vector<Dimensions>& inputs) { return inputs[0].empty() ? -1 : inputs[0].back(); };
  return kind;
}

OperatorKind block_attention(const BlockAttentionForm& form) {
  OperatorKind kind;
  kind.name = form.name();
  kind.since_version = 3;
  kind.input_types = {ort::kFloat, ort::kFloat, ort::kFloat};
  add_weights(kind, form.qkv.sparse);
  kind.required = kind.input_types.size();
  kind.create = [form](const ort::Api& api, const OrtKernelInfo* info) { return std::make_unique<BlockAttentionNode>(api, info, form); };
  kind.last_dimension = [form](const std::vector<Dimensions>& inputs) {
    const Dimensions& scale = inputs[form.qkv.scale()];
    return scale.size() == 1 && scale[0] % 3 == 0 ? scale[0] / 3 : -1;
  };
  return kind;
}

OperatorKind qkv_attention() {
  OperatorKind kind;
  kind.name = "QKVAttention";
  kind.since_version = 2;
  kind.input_types = {ort::kFloat};
  kind.required = 1;
  kind.linear_layer = false;
  kind.create = [](const ort::Api& api, const OrtKernelInfo* info) { return std::make_unique<AttentionNode>(api, info); };
  kind.last_dimension = [](const std::vector<Dimensions>& inputs) {
    const int64_t columns = inputs[0].size() == 3 ? inputs[0][2] : -1;
    return columns >= 0 && columns % 3 == 0 ? columns / 3 : -1;
  };
  return kind;
}

std::vector<OperatorKind> all() {
  std::vector<OperatorKind> kinds{sparse_matmul(), qkv_attention()};
  for (const bool layer_norm : {false, true})
    for (const bool sparse : {false, true}) {
      kinds.push_back(int8_matmul({layer_norm, sparse, false, false}));
      kinds.push_back(int8_matmul({layer_norm, sparse, true, false}));
      kinds.push_back(int8_matmul({layer_norm, sparse, false, true}));
    }
  for (const bool first_sparse : {false, true})
    for (const bool second_sparse : {false, true}) kinds.push_back(mlp({first_sparse, second_sparse}));
  for (const bool sparse : {false, true}) kinds.push_back(block_attention(BlockAttentionForm(sparse)));
  return kinds;
}

}  // namespace

const std::vector<OperatorKind>& operators() {
  static const auto* kinds = new std::vector<OperatorKind>(all());  // never freed: sessions may outlive static objects
  return *kinds;
}

}  // namespace vitoats
