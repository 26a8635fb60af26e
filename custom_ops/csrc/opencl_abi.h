/* The part of OpenCL 1.2 that the plugin uses, declared by us: drivers are found at run time.
 * opencl_check.c compares every declaration with Khronos' headers. */
#ifndef BITCOMPILE_OPENCL_ABI_H
#define BITCOMPILE_OPENCL_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#define CL_CALL __stdcall
#else
#define CL_CALL
#endif

#ifndef BC_CL_THEIRS
typedef struct ClPlatform *ClPlatform;
typedef struct ClDevice *ClDevice;
typedef struct ClContext *ClContext;
typedef struct ClQueue *ClQueue;
typedef struct ClMem *ClMem;
typedef struct ClProgram *ClProgram;
typedef struct ClKernel *ClKernel;
typedef struct ClEvent *ClEvent;
#endif

/* X(ours, Khronos' name, value) */
#define BC_CL_CONSTANTS(X)                                   \
  X(CL_DEVICE_GPU, CL_DEVICE_TYPE_GPU, 4)                    \
  X(CL_DEVICE_ANY, CL_DEVICE_TYPE_ALL, 0xffffffff)           \
  X(CL_MAX_GROUP, CL_DEVICE_MAX_WORK_GROUP_SIZE, 0x1004)     \
  X(CL_MAX_ALLOC, CL_DEVICE_MAX_MEM_ALLOC_SIZE, 0x1010)      \
  X(CL_ADDRESS_ALIGN, CL_DEVICE_MEM_BASE_ADDR_ALIGN, 0x1019) \
  X(CL_LOCAL_BYTES, CL_DEVICE_LOCAL_MEM_SIZE, 0x1023)        \
  X(CL_LITTLE_ENDIAN, CL_DEVICE_ENDIAN_LITTLE, 0x1026)       \
  X(CL_COMPILER, CL_DEVICE_COMPILER_AVAILABLE, 0x1028)       \
  X(CL_NAME, CL_DEVICE_NAME, 0x102b)                         \
  X(CL_DRIVER, CL_DRIVER_VERSION, 0x102d)                    \
  X(CL_PROFILE, CL_DEVICE_PROFILE, 0x102e)                   \
  X(CL_VERSION, CL_DEVICE_VERSION, 0x102f)                   \
  X(CL_EXTENSIONS, CL_DEVICE_EXTENSIONS, 0x1030)             \
  X(CL_UNIFIED, CL_DEVICE_HOST_UNIFIED_MEMORY, 0x1035)       \
  X(CL_PLATFORM, CL_PLATFORM_NAME, 0x0902)                   \
  X(CL_READ_WRITE, CL_MEM_READ_WRITE, 1)                     \
  X(CL_READ_ONLY, CL_MEM_READ_ONLY, 4)                       \
  X(CL_USE_HOST, CL_MEM_USE_HOST_PTR, 8)                     \
  X(CL_ALLOC_HOST, CL_MEM_ALLOC_HOST_PTR, 16)                \
  X(CL_COPY_HOST, CL_MEM_COPY_HOST_PTR, 32)                  \
  X(CL_READING, CL_MAP_READ, 1)                              \
  X(CL_WRITING, CL_MAP_WRITE, 2)                             \
  X(CL_BINARY_SIZES, CL_PROGRAM_BINARY_SIZES, 0x1165)        \
  X(CL_BINARIES, CL_PROGRAM_BINARIES, 0x1166)                \
  X(CL_BUILD_LOG, CL_PROGRAM_BUILD_LOG, 0x1183)              \
  X(CL_KERNEL_GROUP, CL_KERNEL_WORK_GROUP_SIZE, 0x11b0)      \
  X(CL_NO_DEVICE, CL_DEVICE_NOT_FOUND, -1)                   \
  X(CL_NO_MEMORY, CL_MEM_OBJECT_ALLOCATION_FAILURE, -4)      \
  X(CL_NO_RESOURCES, CL_OUT_OF_RESOURCES, -5)                \
  X(CL_NO_HOST_MEMORY, CL_OUT_OF_HOST_MEMORY, -6)            \
  X(CL_BUILD_FAILED, CL_BUILD_PROGRAM_FAILURE, -11)

#define BC_CL_CONSTANT(ours, theirs, value) static const int64_t ours = value;
BC_CL_CONSTANTS(BC_CL_CONSTANT)

/* X(name, result, parameters) */
#define BC_CL_FUNCTIONS(X)                                                                     \
  X(GetPlatformIDs, int32_t, (uint32_t, ClPlatform *, uint32_t *))                             \
  X(GetPlatformInfo, int32_t, (ClPlatform, uint32_t, size_t, void *, size_t *))                \
  X(GetDeviceIDs, int32_t, (ClPlatform, uint64_t, uint32_t, ClDevice *, uint32_t *))           \
  X(GetDeviceInfo, int32_t, (ClDevice, uint32_t, size_t, void *, size_t *))                    \
  X(CreateContext, ClContext,                                                                  \
    (const intptr_t *, uint32_t, const ClDevice *,                                             \
     void(CL_CALL *)(const char *, const void *, size_t, void *), void *, int32_t *))          \
  X(ReleaseContext, int32_t, (ClContext))                                                      \
  X(CreateCommandQueue, ClQueue, (ClContext, ClDevice, uint64_t, int32_t *))                   \
  X(ReleaseCommandQueue, int32_t, (ClQueue))                                                   \
  X(CreateProgramWithSource, ClProgram,                                                        \
    (ClContext, uint32_t, const char **, const size_t *, int32_t *))                           \
  X(CreateProgramWithBinary, ClProgram,                                                        \
    (ClContext, uint32_t, const ClDevice *, const size_t *, const unsigned char **, int32_t *, \
     int32_t *))                                                                               \
  X(BuildProgram, int32_t,                                                                     \
    (ClProgram, uint32_t, const ClDevice *, const char *, void(CL_CALL *)(ClProgram, void *),  \
     void *))                                                                                  \
  X(GetProgramInfo, int32_t, (ClProgram, uint32_t, size_t, void *, size_t *))                  \
  X(GetProgramBuildInfo, int32_t, (ClProgram, ClDevice, uint32_t, size_t, void *, size_t *))   \
  X(ReleaseProgram, int32_t, (ClProgram))                                                      \
  X(CreateKernel, ClKernel, (ClProgram, const char *, int32_t *))                              \
  X(ReleaseKernel, int32_t, (ClKernel))                                                        \
  X(GetKernelWorkGroupInfo, int32_t, (ClKernel, ClDevice, uint32_t, size_t, void *, size_t *)) \
  X(SetKernelArg, int32_t, (ClKernel, uint32_t, size_t, const void *))                         \
  X(CreateBuffer, ClMem, (ClContext, uint64_t, size_t, void *, int32_t *))                     \
  X(ReleaseMemObject, int32_t, (ClMem))                                                        \
  X(EnqueueMapBuffer, void *,                                                                  \
    (ClQueue, ClMem, uint32_t, uint64_t, size_t, size_t, uint32_t, const ClEvent *, ClEvent *, \
     int32_t *))                                                                               \
  X(EnqueueUnmapMemObject, int32_t,                                                            \
    (ClQueue, ClMem, void *, uint32_t, const ClEvent *, ClEvent *))                            \
  X(EnqueueNDRangeKernel, int32_t,                                                             \
    (ClQueue, ClKernel, uint32_t, const size_t *, const size_t *, const size_t *, uint32_t,    \
     const ClEvent *, ClEvent *))                                                              \
  X(Finish, int32_t, (ClQueue))

#define BC_CL_POINTER(name, result, parameters) result(CL_CALL *name) parameters;
typedef struct ClApi {
  BC_CL_FUNCTIONS(BC_CL_POINTER)
} ClApi;

#endif
