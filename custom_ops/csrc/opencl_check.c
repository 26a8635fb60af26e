/* Compares opencl_abi.h with Khronos' headers: compiled by the tests, never linked. */
#define CL_TARGET_OPENCL_VERSION 120
#include <CL/cl.h>

#define ClPlatform cl_platform_id
#define ClDevice cl_device_id
#define ClContext cl_context
#define ClQueue cl_command_queue
#define ClMem cl_mem
#define ClProgram cl_program
#define ClKernel cl_kernel
#define ClEvent cl_event
#define BC_CL_THEIRS /* Khronos' types in the place of ours */
#include "opencl_abi.h"

#define CHECK_CONSTANT(ours, theirs, value) \
  _Static_assert((int64_t)(theirs) == (int64_t)(value), #theirs);
BC_CL_CONSTANTS(CHECK_CONSTANT)

#define CHECK_FUNCTION(name, result, parameters)                                           \
  _Static_assert(                                                                          \
      __builtin_types_compatible_p(__typeof__(&cl##name), __typeof__(((ClApi *)0)->name)), \
      "cl" #name);
BC_CL_FUNCTIONS(CHECK_FUNCTION)
