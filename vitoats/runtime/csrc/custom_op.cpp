// The operator vitoats::SparseMatMul of ONNX Runtime:
//
//   SparseMatMul(x[..., K], values[nnz], mask[N, ceil(K/8)] uint8, bias[N], U[B, N/B, r], V[B, r, K]) -> y[..., N]
//
// y = x (S + U V)^T + bias, attribute in_features = K, with U V [B, N/B, K] as [N, K]; bias is optional, and so are U and V, both or
// none. Everything that a model file says is checked when the session is made; x, and a bias that is no constant, at each call.
// No error leaves this file but as a status. Values, mask, U and V stay where ONNX Runtime has them.
#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "sparse_matmul.h"

#if defined(_WIN32)
#define VITOATS_EXPORT extern "C" __declspec(dllexport)
#else
#define VITOATS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace vitoats {
namespace {

constexpr const char* kDomain = "vitoats";
constexpr const char* kName = "SparseMatMul";

// The nodes for which this thread makes kernels while somebody watches, one a line.
thread_local bool watching = false;
thread_local std::string made_nodes;

// What is wrong, to become a status at the border; code is ONNX Runtime's.
struct Error {
  int code;
  std::string message;
};

[[noreturn]] void refuse(const std::string& message) {
  throw Error{ort::kInvalidArgument, std::string(kDomain) + "::" + kName + ": " + message};
}

// Turns a status of ONNX Runtime, which owns no memory of ours, into an exception that unwinds.
struct StatusError {
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw StatusError{status};
}

// Runs body; whatever it throws becomes a status.
template <class Body>
OrtStatus* guarded(const ort::Api& api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const Error& error) {
    return api.CreateStatus(error.code, error.message.c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(ort::kFail, error.what());
  }
}

struct Shape {
  const ort::Api& api;
  OrtTensorTypeAndShapeInfo* info = nullptr;

  Shape(const ort::Api& a, const OrtValue* value) : api(a) { check(api.GetTensorTypeAndShape(value, &info)); }
  Shape(const Shape&) = delete;
  ~Shape() { api.ReleaseTensorTypeAndShapeInfo(info); }

  int type() const {
    int found = 0;
    check(api.GetTensorElementType(info, &found));
    return found;
  }

  std::vector<int64_t> dimensions() const {
    size_t count = 0;
    check(api.GetDimensionsCount(info, &count));
    std::vector<int64_t> found(count);
    check(api.GetDimensions(info, found.data(), count));
    return found;
  }
};

template <class Element>
const Element* data(const ort::Api& api, const OrtValue* value) {
  void* found = nullptr;
  check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &found));
  return static_cast<const Element*>(found);
}

std::string text(const std::vector<int64_t>& dimensions) {
  std::string found = "[";
  for (const int64_t d : dimensions) found += (found.size() > 1 ? ", " : "") + std::to_string(d);
  return found + "]";
}

// Bit patterns of infinities and NaN: all bits of the exponent are set.
template <class Bits>
bool finite(const void* values, int64_t n, Bits exponent) {
  const auto* bytes = static_cast<const unsigned char*>(values);
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, bytes + static_cast<size_t>(i) * sizeof bits, sizeof bits);
    if ((bits & exponent) == exponent) return false;
  }
  return true;
}

const Kernels& chosen_kernels() {
  if (const Kernels* kernels = choose_kernels()) return *kernels;
  std::string names;
  for (const Kernels* const* k = available_kernels(); *k; ++k) names += std::string(names.empty() ? "" : ", ") + (*k)->name;
  refuse("VITOATS_ISA names no instruction set that this processor has: set it to one of " + names);
}

class Kernel {
 public:
  Kernel(const ort::Api& api, const OrtKernelInfo* info) : api_(api), kernels_(chosen_kernels()) {
    int64_t in_features = 0;
    if (OrtStatus* status = api.KernelInfoGetAttribute_int64(info, "in_features", &in_features)) {
      api.ReleaseStatus(status);
      refuse("the attribute in_features (an integer) is missing");
    }
    if (in_features < 1) refuse("in_features is " + std::to_string(in_features) + ", not 1 or more");

    const OrtValue* values = constant(info, 1, "values");
    const OrtValue* mask = constant(info, 2, "mask");
    const Shape values_shape(api, values), mask_shape(api, mask);
    if (values_shape.type() != ort::kFloat && values_shape.type() != ort::kFloat16) refuse("values are neither float nor float16");
    if (mask_shape.type() != ort::kUint8) refuse("the mask is not uint8");
    const std::vector<int64_t> values_dims = values_shape.dimensions(), mask_dims = mask_shape.dimensions();
    const int64_t stride = in_features / 8 + (in_features % 8 != 0);
    if (values_dims.size() != 1) refuse("values have shape " + text(values_dims) + ", not [nnz]");
    if (mask_dims.size() != 2 || mask_dims[0] < 1 || mask_dims[1] != stride)
      refuse("the mask has shape " + text(mask_dims) + ", not [out_features, " + std::to_string(stride) + "] as in_features = " +
             std::to_string(in_features) + " asks for");
    matrix_.rows = mask_dims[0];
    matrix_.columns = in_features;
    matrix_.mask_stride = stride;
    matrix_.mask = data<uint8_t>(api, mask);
    matrix_.values = data<void>(api, values);
    matrix_.half = values_shape.type() == ort::kFloat16;
    index_rows(values_dims[0]);
    all_finite(values, "a value");
    size_t inputs = 0;
    check(api.KernelInfo_GetInputCount(info, &inputs));
    int is_constant = 0;
    const OrtValue* bias = nullptr;
    if (inputs > 3) check(api.KernelInfoGetConstantInput_tensor(info, 3, &is_constant, &bias));
    if (is_constant && bias) bias_data(bias);
    LowRank low_rank{1, 0, nullptr, nullptr};
    if (inputs > 4) low_rank = low_rank_term(info, inputs);
    weights_.emplace(matrix_, low_rank);
  }

  const ort::Api& api() const { return api_; }

  void compute(OrtKernelContext* context) const {
    const OrtValue* x = nullptr;
    check(api_.KernelContext_GetInput(context, 0, &x));
    const Shape shape(api_, x);
    std::vector<int64_t> dims = shape.dimensions();
    if (shape.type() != ort::kFloat) refuse("x is not float");
    if (dims.empty() || dims.back() != matrix_.columns)
      refuse("x has shape " + text(dims) + ", its last dimension is not in_features = " + std::to_string(matrix_.columns));
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) tokens *= dims[i];
    dims.back() = matrix_.rows;
    const OrtValue* bias = nullptr;
    size_t inputs = 0;
    check(api_.KernelContext_GetInputCount(context, &inputs));
    if (inputs > 3) check(api_.KernelContext_GetInput(context, 3, &bias));
    Output output{};
    if (bias) output.bias = bias_data(bias);
    OrtValue* y = nullptr;
    check(api_.KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &y));
    output.data = const_cast<float*>(data<float>(api_, y));
    const Pool pool(api_, context);
    if (!multiply(kernels_, *weights_, data<float>(api_, x), tokens, output, pool))
      throw Error{ort::kFail, "vitoats::SparseMatMul: out of memory for the transposed activations"};
  }

 private:
  // ONNX Runtime's own threads.
  struct Pool : Parallel {
    const ort::Api& api;
    OrtKernelContext* context;
    Pool(const ort::Api& a, OrtKernelContext* c) : api(a), context(c) {}
    void run(void (*call)(void*, size_t), size_t n, void* work) const override {
      if (n == 1) return call(work, 0);
      check(api.KernelContext_ParallelFor(context, call, n, n, work));
    }
  };

  const ort::Api& api_;
  const Kernels& kernels_;
  SparseMatrix matrix_{};
  std::vector<int64_t> row_start_;
  std::optional<Weights> weights_;

  const OrtValue* constant(const OrtKernelInfo* info, size_t input, const char* name) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api_.KernelInfoGetConstantInput_tensor(info, input, &is_constant, &value));
    if (!is_constant || !value) refuse(std::string(name) + " is not a constant of the model");
    return value;
  }

  // The bias, whose type and shape must be right.
  const float* bias_data(const OrtValue* value) const {
    const Shape shape(api_, value);
    const std::vector<int64_t> found = shape.dimensions(), expected{matrix_.rows};
    if (shape.type() != ort::kFloat) refuse("bias is not float");
    if (found != expected) refuse("bias has shape " + text(found) + ", not " + text(expected));
    return data<float>(api_, value);
  }

  LowRank low_rank_term(const OrtKernelInfo* info, size_t inputs) const {
    if (inputs < 6) refuse("there is U without V");
    const OrtValue *U = constant(info, 4, "U"), *V = constant(info, 5, "V");
    const Shape U_shape(api_, U), V_shape(api_, V);
    const int type = matrix_.half ? ort::kFloat16 : ort::kFloat;
    if (U_shape.type() != type || V_shape.type() != type) refuse("U and V are not of the type of values");
    const std::vector<int64_t> found = U_shape.dimensions(), V_found = V_shape.dimensions();
    if (found.size() != 3 || found[0] < 1 || matrix_.rows % found[0] || found[1] != matrix_.rows / found[0])
      refuse("U has shape " + text(found) + ", not [blocks, " + std::to_string(matrix_.rows) + " / blocks, rank]");
    const std::vector<int64_t> expected{found[0], found[2], matrix_.columns};
    if (V_found != expected) refuse("V has shape " + text(V_found) + ", not " + text(expected));
    all_finite(U, "a number of U");
    all_finite(V, "a number of V");
    return {found[0], found[2], data<void>(api_, U), data<void>(api_, V)};
  }

  void all_finite(const OrtValue* value, const char* name) const {
    const Shape shape(api_, value);
    int64_t n = 1;
    for (const int64_t d : shape.dimensions()) n *= d;
    const void* numbers = data<void>(api_, value);
    if (!(matrix_.half ? finite<uint16_t>(numbers, n, 0x7c00) : finite<uint32_t>(numbers, n, 0x7f800000)))
      refuse(std::string(name) + " is infinite or NaN");
  }

  // Counts the mask's bits, row by row, against the values.
  void index_rows(int64_t n_values) {
    row_start_.resize(static_cast<size_t>(matrix_.rows) + 1);
    const int used = static_cast<int>(matrix_.columns % 8);
    int64_t total = 0;
    for (int64_t row = 0; row < matrix_.rows; ++row) {
      const uint8_t* bytes = matrix_.mask + row * matrix_.mask_stride;
      if (used && bytes[matrix_.mask_stride - 1] >> used) refuse("the mask has a bit past the last column");
      for (int64_t i = 0; i < matrix_.mask_stride; ++i) total += __builtin_popcount(bytes[i]);
      row_start_[static_cast<size_t>(row) + 1] = total;
    }
    if (total != n_values)
      refuse("the mask has " + std::to_string(total) + " bits set for " + std::to_string(n_values) + " values");
    matrix_.row_start = row_start_.data();
  }
};

// The operator of one runtime library; a process could load several.
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
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };  // the processor's
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return std::numeric_limits<int>::max(); };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      const ort::Api& api = static_cast<const Operator*>(op)->api;
      return guarded(api, [&] {
        *kernel = new Kernel(api, info);
        note_node(api, info);
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const auto* self = static_cast<const Kernel*>(kernel);
      return guarded(self->api(), [&] { self->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShape = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
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

  // y has x's dimensions but for the last, which is the mask's first. Shapes that are not known stay so.
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


// An operator and its domain must outlive all sessions, so they are never freed; one of each for every runtime library.
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

// What SessionOptions.register_custom_ops_library calls.
VITOATS_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace vitoats;
  const OrtApi* table = base->GetApi(ort::kApiVersion);
  if (!table) return ort::status_of_old_runtime(base, "vitoats needs ONNX Runtime 1.17 or newer");
  const ort::Api api(table);
  return guarded(api, [&] {
    chosen_kernels();  // refuses a wrong VITOATS_ISA here already
    check(api.AddCustomOpDomain(options, domain_of(table)));
  });
}

// For vitoats.runtime, without a session:

// The instruction set whose kernels new sessions get; empty if VITOATS_ISA names none that runs here.
VITOATS_EXPORT const char* vitoats_isa() {
  const vitoats::Kernels* kernels = vitoats::choose_kernels();
  return kernels ? kernels->name : "";
}

// The i-th instruction set that runs here, best first; null past the last.
VITOATS_EXPORT const char* vitoats_available_isa(int i) {
  const vitoats::Kernels* const* list = vitoats::available_kernels();
  for (; i > 0 && *list; --i) ++list;
  return *list ? (*list)->name : nullptr;
}

// Does fused multiply-adds on registers alone; returns how many floating-point operations. The caller takes the time.
VITOATS_EXPORT double vitoats_fma(int64_t rounds) {
  const vitoats::Kernels* kernels = vitoats::choose_kernels();
  return kernels ? kernels->fma(rounds) : 0;
}

// From now on, notes for which nodes this thread makes kernels; forgets those noted so far.
VITOATS_EXPORT void vitoats_watch_nodes() {
  vitoats::watching = true;
  vitoats::made_nodes.clear();
}

// Ends the watch; copies the nodes' names, one a line, as far as they fit. Returns the size they need, in bytes.
VITOATS_EXPORT size_t vitoats_watched_nodes(char* buffer, size_t size) {
  const std::string& names = vitoats::made_nodes;
  if (size) std::memcpy(buffer, names.data(), std::min(size, names.size()));
  vitoats::watching = false;
  return names.size();
}
