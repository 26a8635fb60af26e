/* A stand-in for libcuda.so.1 that reports one GPU and can do nothing with it. */
int cuInit(unsigned flags) { return (void)flags, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  return (void)attribute, (void)device, *value = 8, 0;
}
#define UNABLE(name) \
  int name(void) { return 801; } /* CUDA_ERROR_NOT_SUPPORTED */
UNABLE(cuCtxGetDevice)
UNABLE(cuLibraryLoadData)
UNABLE(cuLibraryGetKernel)
UNABLE(cuKernelGetAttribute)
UNABLE(cuKernelSetAttribute)
UNABLE(cuLaunchKernelEx)
UNABLE(cuGetErrorString)
