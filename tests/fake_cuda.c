/* A stand-in for libcuda.so.1 with one GPU (an A100's sizes): it launches nothing, but refuses what
 * a GPU refuses. */
#include <string.h>

int cuInit(unsigned flags) { return (void)flags, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device) { return *device = 0, 0; }
int cuDeviceGetName(char *name) { return strcpy(name, "a stand-in"), 0; }
#ifndef COMPUTE_CAPABILITY
#define COMPUTE_CAPABILITY 8
#endif
enum { PROCESSORS = 16, MAJOR = 75, MINOR = 76, SHARED = 97, SHARED_BYTES = 166912 };
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == PROCESSORS ? 108
           : attribute == MAJOR    ? COMPUTE_CAPABILITY
           : attribute == SHARED   ? SHARED_BYTES
                                   : 0;
  return (void)device, 0;
}
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuLibraryLoadData(void **library) { return *library = library, 0; }
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  return (void)library, *kernel = kernel, strstr(name, "wgmma") ? 500 : 0; /* of Hopper alone */
}
int cuKernelGetAttribute(int *value) { return *value = 0, 0; }
int cuKernelSetAttribute(void) { return 0; }
int cuLaunchKernelEx(const unsigned *config) { /* CUlaunchConfig: grid, block, shared memory */
  int fits = config[0] && config[0] <= 0x7fffffffu && config[1] && config[1] <= 65535 &&
             config[3] && config[3] <= 1024 && config[6] <= SHARED_BYTES;
  return fits ? 0 : 1; /* CUDA_ERROR_INVALID_VALUE */
}
int cuGetErrorString(int result, const char **text) { return *text = "invalid value", result; }
