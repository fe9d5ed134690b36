// The custom operator vitoats::SparseMatMul for ONNX Runtime, and the functions that the library exports:
//
//   SparseMatMul(x[..., K], values[nnz], mask[N, ceil(K/8)] uint8, bias[N], U[B, N/B, r], V[B, r, K]) -> y[..., N]
//
// y = x (S + U V)^T + bias, attribute in_features = K, with U V [B, N/B, K] reshaped to [N, K]. bias is optional; U and V are
// optional together. The constants in a model file are checked when the session is created; x and a bias that is not a constant
// are checked at each call.
#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "node.h"
#include "status.h"

#if defined(_WIN32)
#define VITOATS_EXPORT extern "C" __declspec(dllexport)
#else
#define VITOATS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace vitoats {
namespace {

constexpr const char* kDomain = "vitoats";
constexpr const char* kName = "SparseMatMul";

// The nodes for which this thread creates kernels while watching is on, one per line.
thread_local bool watching = false;
thread_local std::string made_nodes;

// The operator for one ONNX Runtime library; a process may load several.
struct Operator : OrtCustomOp {
  ort::Api api;

  explicit Operator(const OrtApi* table) : OrtCustomOp{}, api(table) {
    version = ort::kApiVersion;
    GetName = [](const OrtCustomOp*) { return kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 6; };
    GetInputType = [](const OrtCustomOp*, size_t i) -> int {
      constexpr int types[] = {ort::kFloat, ort::kAny, ort::kUint8, ort::kFloat, ort::kAny, ort::kAny};
      return types[i];
    };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ort::kFloat; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) -> int { return i < 3 ? ort::kRequired : ort::kOptional; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };  // CPU memory
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return std::numeric_limits<int>::max(); };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      const ort::Api& api = static_cast<const Operator*>(op)->api;
      return guarded(api, [&] {
        auto node = std::make_unique<Node>(api, info);
        note_node(api, info);
        *kernel = node.release();
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const auto* self = static_cast<const Node*>(kernel);
      return guarded(self->api(), [&] { self->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
    InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
      const ort::Api& api = static_cast<const Operator*>(op)->api;
      return guarded(api, [&] { infer_shape(api, context); });
    };
  }

  static void note_node(const ort::Api& api, const OrtKernelInfo* info) {
    if (!watching) return;
    char name[512] = "";
    size_t size = sizeof name;
    if (OrtStatus* status = api.KernelInfo_GetNodeName(info, name, &size)) api.ReleaseStatus(status);
    made_nodes.append(name).append("\n");
  }

  // y has the dimensions of x except for the last, which is the first of the mask. Unknown shapes stay unknown.
  static void infer_shape(const ort::Api& api, OrtShapeInferContext* context) {
    OrtTensorTypeAndShapeInfo *x = nullptr, *mask = nullptr, *y = nullptr;
    check(api.ShapeInferContext_GetInputTypeShape(context, 0, &x));
    check(api.ShapeInferContext_GetInputTypeShape(context, 2, &mask));
    size_t rank = 0, mask_rank = 0;
    check(api.GetDimensionsCount(x, &rank));
    check(api.GetDimensionsCount(mask, &mask_rank));
    if (rank < 1 || mask_rank != 2) return;
    std::vector<int64_t> dims(rank);
    std::vector<const char*> symbols(rank);
    int64_t mask_dims[2];
    check(api.GetDimensions(x, dims.data(), rank));
    check(api.GetSymbolicDimensions(x, symbols.data(), rank));
    check(api.GetDimensions(mask, mask_dims, 2));
    dims.back() = mask_dims[0];
    symbols.back() = "";
    check(api.CreateTensorTypeAndShapeInfo(&y));
    OrtStatus* status = api.SetTensorElementType(y, ort::kFloat);
    if (!status) status = api.SetDimensions(y, dims.data(), rank);
    if (!status) status = api.SetSymbolicDimensions(y, symbols.data(), rank);
    if (!status) status = api.ShapeInferContext_SetOutputTypeShape(context, 0, y);
    api.ReleaseTensorTypeAndShapeInfo(y);
    check(status);
  }
};

// One operator and domain for each ONNX Runtime library. They must outlive all sessions, so they are never freed.
OrtCustomOpDomain* domain_of(const OrtApi* table) {
  static std::mutex mutex;
  static std::map<const OrtApi*, OrtCustomOpDomain*> domains;
  const std::lock_guard<std::mutex> lock(mutex);
  OrtCustomOpDomain*& domain = domains[table];
  if (!domain) {
    auto* op = new Operator(table);
    OrtCustomOpDomain* made = nullptr;
    check(op->api.CreateCustomOpDomain(kDomain, &made));
    check(op->api.CustomOpDomain_Add(made, op));
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
  return guarded(api, [&] {
    chosen_kernels();  // refuses an invalid VITOATS_ISA early
    check(api.AddCustomOpDomain(options, domain_of(table)));
  });
}

// Functions for vitoats.runtime that need no session:

// The instruction set of the kernels in new sessions; empty if VITOATS_ISA names none that this processor supports.
VITOATS_EXPORT const char* vitoats_isa() {
  const vitoats::Kernels* kernels = vitoats::choose_kernels(vitoats::ValueType::kFloat32);
  return kernels ? kernels->isa : "";
}

// The i-th instruction set that this processor supports, best first; null past the last.
VITOATS_EXPORT const char* vitoats_available_isa(int i) {
  for (const vitoats::Kernels* const* k = vitoats::available_kernels(); *k; ++k)
    if ((*k)->value_type == vitoats::ValueType::kFloat32 && i-- == 0) return (*k)->isa;
  return nullptr;
}

// Does fused multiply-adds on registers only; returns the number of floating-point operations. The caller measures the time.
VITOATS_EXPORT double vitoats_fma(int64_t rounds) {
  const vitoats::Kernels* kernels = vitoats::choose_kernels(vitoats::ValueType::kFloat32);
  return kernels ? kernels->fma(rounds) : 0;
}

// Starts recording the nodes for which this thread creates kernels; forgets earlier records.
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
