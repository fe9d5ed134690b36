"""ort_abi.h declares ONNX Runtime's C interface by hand: its slots and structs against the published layout.

API is the order of the functions in ``struct OrtApi`` up to version 17 of the interface, that of ONNX Runtime 1.17, as its
onnxruntime_c_api.h publishes it (MIT licence, Copyright (c) Microsoft Corporation); names alone, no code. The struct only ever
grows, and ONNX Runtime's sources hold the last slot of each version fixed: LAST_SLOTS.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ABI = (Path(__file__).parent.parent.parent / "vitoats" / "runtime" / "csrc" / "ort_abi.h").read_text()
HEADERS = sorted(Path("/usr/include").glob("**/onnxruntime_c_api.h"))  # where the machine has a package of it

API = {
    1: """CreateStatus GetErrorCode GetErrorMessage CreateEnv CreateEnvWithCustomLogger EnableTelemetryEvents
        DisableTelemetryEvents CreateSession CreateSessionFromArray Run CreateSessionOptions SetOptimizedModelFilePath
        CloneSessionOptions SetSessionExecutionMode EnableProfiling DisableProfiling EnableMemPattern DisableMemPattern
        EnableCpuMemArena DisableCpuMemArena SetSessionLogId SetSessionLogVerbosityLevel SetSessionLogSeverityLevel
        SetSessionGraphOptimizationLevel SetIntraOpNumThreads SetInterOpNumThreads CreateCustomOpDomain CustomOpDomain_Add
        AddCustomOpDomain RegisterCustomOpsLibrary SessionGetInputCount SessionGetOutputCount
        SessionGetOverridableInitializerCount SessionGetInputTypeInfo SessionGetOutputTypeInfo
        SessionGetOverridableInitializerTypeInfo SessionGetInputName SessionGetOutputName
        SessionGetOverridableInitializerName CreateRunOptions RunOptionsSetRunLogVerbosityLevel
        RunOptionsSetRunLogSeverityLevel RunOptionsSetRunTag RunOptionsGetRunLogVerbosityLevel
        RunOptionsGetRunLogSeverityLevel RunOptionsGetRunTag RunOptionsSetTerminate RunOptionsUnsetTerminate
        CreateTensorAsOrtValue CreateTensorWithDataAsOrtValue IsTensor GetTensorMutableData FillStringTensor
        GetStringTensorDataLength GetStringTensorContent CastTypeInfoToTensorInfo GetOnnxTypeFromTypeInfo
        CreateTensorTypeAndShapeInfo SetTensorElementType SetDimensions GetTensorElementType GetDimensionsCount GetDimensions
        GetSymbolicDimensions GetTensorShapeElementCount GetTensorTypeAndShape GetTypeInfo GetValueType CreateMemoryInfo
        CreateCpuMemoryInfo CompareMemoryInfo MemoryInfoGetName MemoryInfoGetId MemoryInfoGetMemType MemoryInfoGetType
        AllocatorAlloc AllocatorFree AllocatorGetInfo GetAllocatorWithDefaultOptions AddFreeDimensionOverride GetValue
        GetValueCount CreateValue CreateOpaqueValue GetOpaqueValue KernelInfoGetAttribute_float KernelInfoGetAttribute_int64
        KernelInfoGetAttribute_string KernelContext_GetInputCount KernelContext_GetOutputCount KernelContext_GetInput
        KernelContext_GetOutput ReleaseEnv ReleaseStatus ReleaseMemoryInfo ReleaseSession ReleaseValue ReleaseRunOptions
        ReleaseTypeInfo ReleaseTensorTypeAndShapeInfo ReleaseSessionOptions ReleaseCustomOpDomain""",
    2: """GetDenotationFromTypeInfo CastTypeInfoToMapTypeInfo CastTypeInfoToSequenceTypeInfo GetMapKeyType GetMapValueType
        GetSequenceElementType ReleaseMapTypeInfo ReleaseSequenceTypeInfo SessionEndProfiling SessionGetModelMetadata
        ModelMetadataGetProducerName ModelMetadataGetGraphName ModelMetadataGetDomain ModelMetadataGetDescription
        ModelMetadataLookupCustomMetadataMap ModelMetadataGetVersion ReleaseModelMetadata""",
    3: """CreateEnvWithGlobalThreadPools DisablePerSessionThreads CreateThreadingOptions ReleaseThreadingOptions
        ModelMetadataGetCustomMetadataMapKeys AddFreeDimensionOverrideByName""",
    4: "GetAvailableProviders ReleaseAvailableProviders",
    5: """GetStringTensorElementLength GetStringTensorElement FillStringTensorElement AddSessionConfigEntry CreateAllocator
        ReleaseAllocator RunWithBinding CreateIoBinding ReleaseIoBinding BindInput BindOutput BindOutputToDevice
        GetBoundOutputNames GetBoundOutputValues ClearBoundInputs ClearBoundOutputs TensorAt CreateAndRegisterAllocator
        SetLanguageProjection SessionGetProfilingStartTimeNs SetGlobalIntraOpNumThreads SetGlobalInterOpNumThreads
        SetGlobalSpinControl""",
    6: """AddInitializer CreateEnvWithCustomLoggerAndGlobalThreadPools SessionOptionsAppendExecutionProvider_CUDA
        SessionOptionsAppendExecutionProvider_ROCM SessionOptionsAppendExecutionProvider_OpenVINO SetGlobalDenormalAsZero
        CreateArenaCfg ReleaseArenaCfg""",
    7: """ModelMetadataGetGraphDescription SessionOptionsAppendExecutionProvider_TensorRT SetCurrentGpuDeviceId
        GetCurrentGpuDeviceId""",
    8: """KernelInfoGetAttributeArray_float KernelInfoGetAttributeArray_int64 CreateArenaCfgV2 AddRunConfigEntry
        CreatePrepackedWeightsContainer ReleasePrepackedWeightsContainer CreateSessionWithPrepackedWeightsContainer
        CreateSessionFromArrayWithPrepackedWeightsContainer""",
    9: """SessionOptionsAppendExecutionProvider_TensorRT_V2 CreateTensorRTProviderOptions UpdateTensorRTProviderOptions
        GetTensorRTProviderOptionsAsString ReleaseTensorRTProviderOptions EnableOrtCustomOps RegisterAllocator
        UnregisterAllocator IsSparseTensor CreateSparseTensorAsOrtValue FillSparseTensorCoo FillSparseTensorCsr
        FillSparseTensorBlockSparse CreateSparseTensorWithValuesAsOrtValue UseCooIndices UseCsrIndices UseBlockSparseIndices
        GetSparseTensorFormat GetSparseTensorValuesTypeAndShape GetSparseTensorValues GetSparseTensorIndicesTypeShape
        GetSparseTensorIndices""",
    10: """HasValue KernelContext_GetGPUComputeStream GetTensorMemoryInfo GetExecutionProviderApi
        SessionOptionsSetCustomCreateThreadFn SessionOptionsSetCustomThreadCreationOptions
        SessionOptionsSetCustomJoinThreadFn SetGlobalCustomCreateThreadFn SetGlobalCustomThreadCreationOptions
        SetGlobalCustomJoinThreadFn SynchronizeBoundInputs SynchronizeBoundOutputs""",
    11: """SessionOptionsAppendExecutionProvider_CUDA_V2 CreateCUDAProviderOptions UpdateCUDAProviderOptions
        GetCUDAProviderOptionsAsString ReleaseCUDAProviderOptions SessionOptionsAppendExecutionProvider_MIGraphX""",
    12: """AddExternalInitializers CreateOpAttr ReleaseOpAttr CreateOp InvokeOp ReleaseOp
        SessionOptionsAppendExecutionProvider CopyKernelInfo ReleaseKernelInfo""",
    13: """GetTrainingApi SessionOptionsAppendExecutionProvider_CANN CreateCANNProviderOptions UpdateCANNProviderOptions
        GetCANNProviderOptionsAsString ReleaseCANNProviderOptions""",
    14: """MemoryInfoGetDeviceType UpdateEnvWithCustomLogLevel SetGlobalIntraOpThreadAffinity RegisterCustomOpsLibrary_V2
        RegisterCustomOpsUsingFunction KernelInfo_GetInputCount KernelInfo_GetOutputCount KernelInfo_GetInputName
        KernelInfo_GetOutputName KernelInfo_GetInputTypeInfo KernelInfo_GetOutputTypeInfo KernelInfoGetAttribute_tensor
        HasSessionConfigEntry GetSessionConfigEntry""",
    15: """SessionOptionsAppendExecutionProvider_Dnnl CreateDnnlProviderOptions UpdateDnnlProviderOptions
        GetDnnlProviderOptionsAsString ReleaseDnnlProviderOptions KernelInfo_GetNodeName KernelInfo_GetLogger
        KernelContext_GetLogger Logger_LogMessage Logger_GetLoggingSeverityLevel KernelInfoGetConstantInput_tensor
        CastTypeInfoToOptionalTypeInfo GetOptionalContainedTypeInfo GetResizedStringTensorElementBuffer
        KernelContext_GetAllocator GetBuildInfoString""",
    16: """CreateROCMProviderOptions UpdateROCMProviderOptions GetROCMProviderOptionsAsString ReleaseROCMProviderOptions
        CreateAndRegisterAllocatorV2 RunAsync UpdateTensorRTProviderOptionsWithValue GetTensorRTProviderOptionsByName
        UpdateCUDAProviderOptionsWithValue GetCUDAProviderOptionsByName KernelContext_GetResource""",
    17: """SetUserLoggingFunction ShapeInferContext_GetInputCount ShapeInferContext_GetInputTypeShape
        ShapeInferContext_GetAttribute ShapeInferContext_SetOutputTypeShape SetSymbolicDimensions ReadOpAttr
        SetDeterministicCompute KernelContext_ParallelFor SessionOptionsAppendExecutionProvider_OpenVINO_V2""",
}
LAST_SLOTS = {
    1: 101, 2: 118, 3: 124, 4: 126, 5: 149, 6: 157, 7: 161, 8: 169, 9: 191, 10: 203, 11: 209, 12: 218, 13: 224, 14: 238,
    15: 254, 16: 265, 17: 275,
}  # fmt: skip
SLOTS = {name: slot for slot, name in enumerate(" ".join(API.values()).split())}

# struct OrtCustomOp after its version
CUSTOM_OP = """
    CreateKernel GetName GetExecutionProviderType GetInputType GetInputTypeCount GetOutputType GetOutputTypeCount
    KernelCompute KernelDestroy GetInputCharacteristic GetOutputCharacteristic GetInputMemoryType GetVariadicInputMinArity
    GetVariadicInputHomogeneity GetVariadicOutputMinArity GetVariadicOutputHomogeneity CreateKernelV2 KernelComputeV2
    InferOutputShapeFn GetStartVersion GetEndVersion
""".split()  # noqa: SIM905
ENUMS = {
    "kFail": ("ORT_FAIL", 1),
    "kInvalidArgument": ("ORT_INVALID_ARGUMENT", 2),
    "kRequired": ("INPUT_OUTPUT_REQUIRED", 0),
    "kOptional": ("INPUT_OUTPUT_OPTIONAL", 1),
    "kAny": ("ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED", 0),
    "kFloat": ("ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT", 1),
    "kUint8": ("ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8", 2),
    "kInt8": ("ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8", 3),
    "kFloat16": ("ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16", 10),
}


def members(struct: str) -> list[str]:
    """Names of the function pointers of a struct of ort_abi.h, in order."""
    body = re.search(rf"struct {struct} {{(.*?)^}};", ABI, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"\(\*(\w+)\)\(", body)


def test_the_layout_ends_each_version_where_onnx_runtime_says():
    last = {version: SLOTS[names.split()[-1]] for version, names in API.items()}
    assert last == LAST_SLOTS


def test_slots_are_those_of_the_layout():
    taken = {name: int(slot) for slot, name in re.findall(r"take\((\d+), (\w+)\);", ABI)}
    assert taken == {name: SLOTS[name] for name in taken}
    assert list(taken) == members("Api"), "a function that is declared and not taken, or the other way round"
    assert "slots[0]" in ABI, "CreateStatus is used before there is a table"
    assert "kApiVersion = 17;" in ABI


def test_the_operator_has_the_fields_of_the_layout():
    assert members("OrtCustomOp") == CUSTOM_OP
    assert members("OrtApiBase") == ["GetApi", "GetVersionString"]


def test_numbers_are_those_of_the_layout():
    assert {name: int(value) for name, value in re.findall(r"(k\w+) = (\d+)[,\s}]", ABI)} == {
        name: value for name, (_, value) in ENUMS.items()
    }


@pytest.mark.skipif(not HEADERS or shutil.which("g++") is None, reason="no package of ONNX Runtime's headers is installed")
def test_the_layout_is_that_of_the_header(tmp_path):
    """Where the header is, it has the last word; a compiler reads it."""
    checks = [f"static_assert(offsetof(OrtApi, {name}) == {slot} * sizeof(void*));" for name, slot in SLOTS.items()]
    checks += [f"static_assert(offsetof(OrtCustomOp, {name}) == {i + 1} * sizeof(void*));" for i, name in enumerate(CUSTOM_OP)]
    checks += [f"static_assert({name} == {value});" for name, value in ENUMS.values()]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(["#include <cstddef>", f'#include "{HEADERS[0]}"', *checks]))
    done = subprocess.run(["g++", "-std=c++17", "-fsyntax-only", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
