// Our own declarations of the part of ONNX Runtime's C API that this library uses: no Python package has the headers.
//
// OrtApi is a table of function pointers that only grows, so the index of a slot is stable from the version that introduced it.
// All slots below exist in API version 17 (ONNX Runtime 1.17), the version that the operator declares.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtApi;

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// The description of an operator; the fields and their order are those of API version 17.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

}  // extern "C"

namespace vitoats::ort {

constexpr uint32_t kApiVersion = 17;

enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum Characteristic { kRequired = 0, kOptional = 1 };
enum ElementType { kAny = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10 };

// An error status for an ONNX Runtime whose table is too short for Api.
inline OrtStatus* status_of_old_runtime(const OrtApiBase* base, const char* message) {
  const auto* slots = reinterpret_cast<void* const*>(base->GetApi(1));
  return reinterpret_cast<OrtStatus* (*)(int, const char*)>(slots[0])(kFail, message);
}

// The functions of the table that this library uses.
struct Api {
  OrtStatus* (*CreateStatus)(int code, const char* message);
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain**);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);
  OrtStatus* (*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo**);
  OrtStatus* (*SetTensorElementType)(OrtTensorTypeAndShapeInfo*, int);
  OrtStatus* (*SetDimensions)(OrtTensorTypeAndShapeInfo*, const int64_t*, size_t);
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, int*);
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);
  OrtStatus* (*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo*, const char**, size_t);
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);
  OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo*, const char*, float*);
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char*, int64_t*);
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext*, size_t*);
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t, const OrtValue**);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**);
  void (*ReleaseStatus)(OrtStatus*);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
  OrtStatus* (*KernelInfo_GetInputCount)(const OrtKernelInfo*, size_t*);
  OrtStatus* (*KernelInfo_GetNodeName)(const OrtKernelInfo*, char*, size_t*);
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo*, size_t, int*, const OrtValue**);
  OrtStatus* (*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**);
  OrtStatus* (*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*);
  OrtStatus* (*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo*, const char**, size_t);
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext*, void (*)(void*, size_t), size_t total, size_t batches, void*);

  explicit Api(const OrtApi* table) : slots_(reinterpret_cast<void* const*>(table)) {
    take(0, CreateStatus);
    take(26, CreateCustomOpDomain);
    take(27, CustomOpDomain_Add);
    take(28, AddCustomOpDomain);
    take(51, GetTensorMutableData);
    take(57, CreateTensorTypeAndShapeInfo);
    take(58, SetTensorElementType);
    take(59, SetDimensions);
    take(60, GetTensorElementType);
    take(61, GetDimensionsCount);
    take(62, GetDimensions);
    take(63, GetSymbolicDimensions);
    take(65, GetTensorTypeAndShape);
    take(85, KernelInfoGetAttribute_float);
    take(86, KernelInfoGetAttribute_int64);
    take(88, KernelContext_GetInputCount);
    take(90, KernelContext_GetInput);
    take(91, KernelContext_GetOutput);
    take(93, ReleaseStatus);
    take(99, ReleaseTensorTypeAndShapeInfo);
    take(230, KernelInfo_GetInputCount);
    take(244, KernelInfo_GetNodeName);
    take(249, KernelInfoGetConstantInput_tensor);
    take(268, ShapeInferContext_GetInputTypeShape);
    take(270, ShapeInferContext_SetOutputTypeShape);
    take(271, SetSymbolicDimensions);
    take(274, KernelContext_ParallelFor);
  }

 private:
  void* const* slots_;

  template <class Function>
  void take(int slot, Function& function) const {
    function = reinterpret_cast<Function>(slots_[slot]);
  }
};

}  // namespace vitoats::ort
