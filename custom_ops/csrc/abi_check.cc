// Compiles if and only if ort_abi.h agrees with the real ONNX Runtime headers. CI runs it against
// Debian's libonnxruntime-dev; nothing of those headers is shipped.
#include "onnxruntime_c_api.h"

#include "ort_abi.h"

#define CHECK_SLOT(name, index, result, parameters) \
  static_assert(offsetof(OrtApi, name) == (index) * sizeof(void *), "slot of " #name);
BC_API_TABLE(CHECK_SLOT)

#define CHECK_FIELD(name) \
  static_assert(offsetof(OrtCustomOp, name) == offsetof(BcOp, name), "field " #name);
CHECK_FIELD(version)
CHECK_FIELD(CreateKernel)
CHECK_FIELD(GetName)
CHECK_FIELD(GetExecutionProviderType)
CHECK_FIELD(GetInputType)
CHECK_FIELD(GetInputTypeCount)
CHECK_FIELD(GetOutputType)
CHECK_FIELD(GetOutputTypeCount)
CHECK_FIELD(KernelCompute)
CHECK_FIELD(KernelDestroy)
CHECK_FIELD(GetInputCharacteristic)
CHECK_FIELD(GetOutputCharacteristic)
CHECK_FIELD(GetInputMemoryType)
CHECK_FIELD(GetVariadicInputMinArity)
CHECK_FIELD(GetVariadicInputHomogeneity)
CHECK_FIELD(GetVariadicOutputMinArity)
CHECK_FIELD(GetVariadicOutputHomogeneity)
CHECK_FIELD(CreateKernelV2)
CHECK_FIELD(KernelComputeV2)
CHECK_FIELD(InferOutputShapeFn)
CHECK_FIELD(GetStartVersion)
CHECK_FIELD(GetEndVersion)
CHECK_FIELD(GetMayInplace)
CHECK_FIELD(ReleaseMayInplace)
CHECK_FIELD(GetAliasMap)
CHECK_FIELD(ReleaseAliasMap)
static_assert(sizeof(OrtCustomOp) == sizeof(BcOp), "size of OrtCustomOp");

static_assert(offsetof(OrtAllocator, Alloc) == offsetof(BcAllocator, Alloc), "OrtAllocator.Alloc");
static_assert(offsetof(OrtAllocator, Free) == offsetof(BcAllocator, Free), "OrtAllocator.Free");
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(BcApiBase, GetApi), "OrtApiBase.GetApi");

static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == BC_FLOAT, "float");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == BC_FLOAT16, "float16");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 == BC_BFLOAT16, "bfloat16");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 == BC_UINT8, "uint8");
static_assert(ORT_FAIL == BC_FAIL && ORT_INVALID_ARGUMENT == BC_INVALID_ARGUMENT, "error codes");
static_assert(OrtArenaAllocator == BC_ARENA && OrtMemTypeDefault == BC_MEM_DEFAULT, "memory");
static_assert(ORT_OP_ATTR_INT == BC_ATTR_INT, "attribute type");

int main() { return 0; }
