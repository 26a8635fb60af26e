/* The part of the ONNX Runtime C ABI that the plugin uses, declared by us.
 *
 * OrtApi is an append-only table of function pointers; a slot index never changes. Requesting API
 * 17 (ONNX Runtime 1.17) therefore works with every newer runtime. abi_check.cc compares every
 * slot, field and constant below with the real headers. */
#ifndef BITCOMPILE_ORT_ABI_H
#define BITCOMPILE_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define BC_CALL __stdcall
#define BC_EXPORT __declspec(dllexport)
#else
#define BC_CALL
#define BC_EXPORT __attribute__((visibility("default")))
#endif

#define BC_ORT_API 17

enum { BC_FLOAT = 1, BC_UINT8 = 2, BC_FLOAT16 = 10, BC_BFLOAT16 = 16 }; /* element types */
enum { BC_FAIL = 1, BC_INVALID_ARGUMENT = 2 };                          /* OrtErrorCode */
enum { BC_ARENA = 1, BC_MEM_DEFAULT = 0 }; /* OrtArenaAllocator, OrtMemTypeDefault */
enum { BC_ATTR_INT = 1 };                  /* ORT_OP_ATTR_INT */

typedef struct BcStatus BcStatus;
typedef struct BcValue BcValue;
typedef struct BcInfo BcInfo;       /* OrtKernelInfo */
typedef struct BcContext BcContext; /* OrtKernelContext */
typedef struct BcShape BcShape;     /* OrtTensorTypeAndShapeInfo */
typedef struct BcOptions BcOptions; /* OrtSessionOptions */
typedef struct BcDomain BcDomain;
typedef struct BcInfer BcInfer; /* OrtShapeInferContext */
typedef struct BcOpAttr BcOpAttr;
typedef struct BcMemoryInfo BcMemoryInfo;

typedef struct BcAllocator { /* OrtAllocator, the fields of every version */
  uint32_t version;
  void *(BC_CALL *Alloc)(struct BcAllocator *, size_t);
  void(BC_CALL *Free)(struct BcAllocator *, void *);
} BcAllocator;

typedef struct BcApi {
  void *slot[1];
} BcApi;

typedef struct BcApiBase {
  const BcApi *(BC_CALL *GetApi)(uint32_t);
  const char *(BC_CALL *GetVersionString)(void);
} BcApiBase;

struct BcOp;

/* X(name, slot, result, parameters) */
#define BC_API_TABLE(X)                                                                          \
  X(CreateStatus, 0, BcStatus *, (int, const char *))                                            \
  X(CreateCustomOpDomain, 26, BcStatus *, (const char *, BcDomain **))                           \
  X(CustomOpDomain_Add, 27, BcStatus *, (BcDomain *, const struct BcOp *))                       \
  X(AddCustomOpDomain, 28, BcStatus *, (BcOptions *, BcDomain *))                                \
  X(GetTensorMutableData, 51, BcStatus *, (BcValue *, void **))                                  \
  X(CreateTensorTypeAndShapeInfo, 57, BcStatus *, (BcShape **))                                  \
  X(SetTensorElementType, 58, BcStatus *, (BcShape *, int))                                      \
  X(SetDimensions, 59, BcStatus *, (BcShape *, const int64_t *, size_t))                         \
  X(GetTensorElementType, 60, BcStatus *, (const BcShape *, int *))                              \
  X(GetDimensionsCount, 61, BcStatus *, (const BcShape *, size_t *))                             \
  X(GetDimensions, 62, BcStatus *, (const BcShape *, int64_t *, size_t))                         \
  X(GetSymbolicDimensions, 63, BcStatus *, (const BcShape *, const char **, size_t))             \
  X(GetTensorTypeAndShape, 65, BcStatus *, (const BcValue *, BcShape **))                        \
  X(CreateMemoryInfo, 68, BcStatus *, (const char *, int, int, int, BcMemoryInfo **))            \
  X(CreateCpuMemoryInfo, 69, BcStatus *, (int, int, BcMemoryInfo **))                            \
  X(KernelInfoGetAttribute_float, 85, BcStatus *, (const BcInfo *, const char *, float *))       \
  X(KernelInfoGetAttribute_int64, 86, BcStatus *, (const BcInfo *, const char *, int64_t *))     \
  X(KernelInfoGetAttribute_string, 87, BcStatus *,                                               \
    (const BcInfo *, const char *, char *, size_t *))                                            \
  X(KernelContext_GetInput, 90, BcStatus *, (const BcContext *, size_t, const BcValue **))       \
  X(KernelContext_GetOutput, 91, BcStatus *,                                                     \
    (BcContext *, size_t, const int64_t *, size_t, BcValue **))                                  \
  X(ReleaseStatus, 93, void, (BcStatus *))                                                       \
  X(ReleaseMemoryInfo, 94, void, (BcMemoryInfo *))                                               \
  X(ReleaseTensorTypeAndShapeInfo, 99, void, (BcShape *))                                        \
  X(ReleaseAllocator, 132, void, (BcAllocator *))                                                \
  X(KernelContext_GetGPUComputeStream, 193, BcStatus *, (const BcContext *, void **))            \
  X(KernelInfoGetConstantInput_tensor, 249, BcStatus *,                                          \
    (const BcInfo *, size_t, int *, const BcValue **))                                           \
  X(KernelContext_GetAllocator, 253, BcStatus *,                                                 \
    (const BcContext *, const BcMemoryInfo *, BcAllocator **))                                   \
  X(ShapeInferContext_GetInputTypeShape, 268, BcStatus *, (const BcInfer *, size_t, BcShape **)) \
  X(ShapeInferContext_GetAttribute, 269, BcStatus *,                                             \
    (const BcInfer *, const char *, const BcOpAttr **))                                          \
  X(ShapeInferContext_SetOutputTypeShape, 270, BcStatus *,                                       \
    (const BcInfer *, size_t, const BcShape *))                                                  \
  X(SetSymbolicDimensions, 271, BcStatus *, (BcShape *, const char **, size_t))                  \
  X(ReadOpAttr, 272, BcStatus *, (const BcOpAttr *, int, void *, size_t, size_t *))              \
  X(KernelContext_ParallelFor, 274, BcStatus *,                                                  \
    (const BcContext *, void (*)(void *, size_t), size_t, size_t, void *))

#define BC_DEFINE(name, index, result, parameters)          \
  typedef result(BC_CALL *bc_fn_##name) parameters;         \
  static inline bc_fn_##name ort_##name(const BcApi *api) { \
    return (bc_fn_##name)(api->slot[index]);                \
  }
BC_API_TABLE(BC_DEFINE)

typedef struct BcOp { /* OrtCustomOp with all fields up to API 23: newer runtimes read zeros */
  uint32_t version;
  void *(BC_CALL *CreateKernel)(const struct BcOp *, const BcApi *, const BcInfo *);
  const char *(BC_CALL *GetName)(const struct BcOp *);
  const char *(BC_CALL *GetExecutionProviderType)(const struct BcOp *);
  int(BC_CALL *GetInputType)(const struct BcOp *, size_t);
  size_t(BC_CALL *GetInputTypeCount)(const struct BcOp *);
  int(BC_CALL *GetOutputType)(const struct BcOp *, size_t);
  size_t(BC_CALL *GetOutputTypeCount)(const struct BcOp *);
  void(BC_CALL *KernelCompute)(void *, BcContext *);
  void(BC_CALL *KernelDestroy)(void *);
  int(BC_CALL *GetInputCharacteristic)(const struct BcOp *, size_t);
  int(BC_CALL *GetOutputCharacteristic)(const struct BcOp *, size_t);
  int(BC_CALL *GetInputMemoryType)(const struct BcOp *, size_t);
  int(BC_CALL *GetVariadicInputMinArity)(const struct BcOp *);
  int(BC_CALL *GetVariadicInputHomogeneity)(const struct BcOp *);
  int(BC_CALL *GetVariadicOutputMinArity)(const struct BcOp *);
  int(BC_CALL *GetVariadicOutputHomogeneity)(const struct BcOp *);
  BcStatus *(BC_CALL *CreateKernelV2)(const struct BcOp *, const BcApi *, const BcInfo *, void **);
  BcStatus *(BC_CALL *KernelComputeV2)(void *, BcContext *);
  BcStatus *(BC_CALL *InferOutputShapeFn)(const struct BcOp *, BcInfer *);
  int(BC_CALL *GetStartVersion)(const struct BcOp *);
  int(BC_CALL *GetEndVersion)(const struct BcOp *);
  size_t(BC_CALL *GetMayInplace)(int **, int **);
  void(BC_CALL *ReleaseMayInplace)(int *, int *);
  size_t(BC_CALL *GetAliasMap)(int **, int **);
  void(BC_CALL *ReleaseAliasMap)(int *, int *);
} BcOp;

#endif
