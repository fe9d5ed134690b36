// The custom operators of the domain vitoats for ONNX Runtime, and the functions that the library exports.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "operators.h"
#include "status.h"

#if defined(_WIN32)
#define VITOATS_EXPORT extern "C" __declspec(dllexport)
#else
#define VITOATS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace vitoats {
namespace {

constexpr const char* kDomain = "vitoats";

// The nodes of linear layers for which this thread creates kernels while watching is on, one per line.
thread_local bool watching = false;
thread_local std::string made_nodes;

// An operator for one ONNX Runtime library; a process may load several.
struct Operator : OrtCustomOp {
  const OperatorKind& kind;
  ort::Api api;
  std::string full_name;  // for messages

  Operator(const OperatorKind& of_kind, const OrtApi* table)
      : OrtCustomOp{}, kind(of_kind), api(table), full_name(std::string(kDomain) + "::" + of_kind.name) {
    version = ort::kApiVersion;
    GetName = [](const OrtCustomOp* op) { return self(op).kind.name.c_str(); };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return self(op).kind.input_types.size(); };
    GetInputType = [](const OrtCustomOp* op, size_t i) { return self(op).kind.input_types[i]; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ort::kFloat; };
    GetInputCharacteristic = [](const OrtCustomOp* op, size_t i) -> int {
      return i < self(op).kind.required ? ort::kRequired : ort::kOptional;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };  // CPU memory
    GetStartVersion = [](const OrtCustomOp* op) { return self(op).kind.since_version; };
    GetEndVersion = [](const OrtCustomOp*) { return kDomainVersion; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      const Operator& made_by = self(op);
      return guarded(made_by.api, made_by.full_name.c_str(), [&] {
        auto node = std::make_unique<Made>(Made{made_by, made_by.kind.create(made_by.api, info)});
        if (made_by.kind.linear_layer) note_node(made_by.api, info);
        *kernel = node.release();
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const auto* made = static_cast<const Made*>(kernel);
      return guarded(made->by.api, made->by.full_name.c_str(), [&] { made->node->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Made*>(kernel); };
    InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
      return guarded(self(op).api, self(op).full_name.c_str(), [&] { self(op).infer_shape(context); });
    };
  }

 private:
  struct Made {
    const Operator& by;
    std::unique_ptr<Node> node;
  };

  static const Operator& self(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

  static void note_node(const ort::Api& api, const OrtKernelInfo* info) {
    if (!watching) return;
    char name[512] = "";
    size_t size = sizeof name;
    if (OrtStatus* status = api.KernelInfo_GetNodeName(info, name, &size)) api.ReleaseStatus(status);
    made_nodes.append(name).append("\n");
  }

  // Unknown shapes stay unknown.
  void infer_shape(OrtShapeInferContext* context) const {
    std::vector<Dimensions> inputs;
    OrtTensorTypeAndShapeInfo *x = nullptr, *y = nullptr;
    for (size_t i = 0; i < kind.required; ++i) {
      OrtTensorTypeAndShapeInfo* info = nullptr;
      check(api.ShapeInferContext_GetInputTypeShape(context, i, &info));
      if (i == 0) x = info;
      size_t rank = 0;
      check(api.GetDimensionsCount(info, &rank));
      Dimensions& dimensions = inputs.emplace_back(rank);
      check(api.GetDimensions(info, dimensions.data(), rank));
    }
    Dimensions& dimensions = inputs[0];
    const size_t rank = dimensions.size();
    const int64_t last = kind.last_dimension(inputs);
    if (rank < 1 || last < 0) return;
    std::vector<const char*> symbols(rank);
    check(api.GetSymbolicDimensions(x, symbols.data(), rank));
    dimensions.back() = last;
    symbols.back() = "";
    check(api.CreateTensorTypeAndShapeInfo(&y));
    OrtStatus* status = api.SetTensorElementType(y, ort::kFloat);
    if (!status) status = api.SetDimensions(y, dimensions.data(), rank);
    if (!status) status = api.SetSymbolicDimensions(y, symbols.data(), rank);
    if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, 0, y);
    api.ReleaseTensorTypeAndShapeInfo(y);
    check(status);
  }
};

// The operators and domain for each ONNX Runtime library. They must outlive all sessions, so they are never freed.
OrtCustomOpDomain* domain_of(const OrtApi* table) {
  static std::mutex mutex;
  static std::map<const OrtApi*, OrtCustomOpDomain*> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& domain = domains[table];
  if (!domain) {
    const ort::Api api(table);
    OrtCustomOpDomain* made = nullptr;
    check(api.CreateCustomOpDomain(kDomain, &made));
    for (const OperatorKind& kind : operators()) check(api.CustomOpDomain_Add(made, new Operator(kind, table)));
    domain = made;
  }
  return domain;
}

}  // namespace
}  // namespace vitoats

// The entry point for SessionOptions.register_custom_ops_library.
VITOATS_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace vitoats;
  const OrtApi* table = base->GetApi(ort::kApiVersion);
  if (!table) return ort::status_of_old_runtime(base, "vitoats needs ONNX Runtime 1.17 or newer");
  const ort::Api api(table);
  return guarded(api, kDomain, [&] {
    checked_isa();  // refuses an invalid VITOATS_ISA early
    check(api.AddCustomOpDomain(options, domain_of(table)));
  });
}

// Functions for vitoats.runtime that need no session:

// The instruction set of the kernels in new sessions; empty if VITOATS_ISA names none that this processor supports.
VITOATS_EXPORT const char* vitoats_isa() {
  const char* isa = vitoats::chosen_isa();
  return isa ? isa : "";
}

// The i-th instruction set that this processor supports, best first; null past the last.
VITOATS_EXPORT const char* vitoats_available_isa(int i) {
  const char* const* isa = vitoats::supported_isas();
  for (; *isa && i > 0; --i) ++isa;
  return *isa;
}

// Does fused multiply-adds on registers only; returns the number of floating-point operations. The caller measures the time.
VITOATS_EXPORT double vitoats_fma(int64_t rounds) {
  const char* isa = vitoats::chosen_isa();
  return isa ? vitoats::float_row(vitoats::ValueType::kFloat32, isa).fma(rounds) : 0;
}

// Starts recording the nodes of linear layers for which this thread creates kernels; forgets earlier records.
VITOATS_EXPORT void vitoats_watch_nodes() {
  vitoats::watching = true;
  vitoats::made_nodes.clear();
}

// Stops recording; copies the nodes' names, one per line, as far as they fit. Returns the size they need, in bytes.
VITOATS_EXPORT size_t vitoats_watched_nodes(char* buffer, size_t size) {
  const std::string& names = vitoats::made_nodes;
  if (size) std::memcpy(buffer, names.data(), std::min(size, names.size()));
  vitoats::watching = false;
  return names.size();
}
