/* A driver that passes everything on to the real one, but for the fault that FAKE_OPENCL names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "opencl_abi.h"

#define REAL(name) ((__typeof__(&cl##name))dlsym(RTLD_NEXT, "cl" #name))

/* Keeps the real driver among this library's own, where dlsym finds what is not here. */
int32_t clFinish(ClQueue queue);
int32_t (*const fake_opencl_anchor)(ClQueue) = clFinish;

/* Whether FAKE_OPENCL, names with commas between them, has this one. */
static int fault(const char *name) {
  const char *wanted = getenv("FAKE_OPENCL");
  size_t length = strlen(name);
  while (wanted && *wanted) {
    size_t word = strcspn(wanted, ",");
    if (word == length && !strncmp(wanted, name, length)) return 1;
    wanted += word + (wanted[word] == ',');
  }
  return 0;
}

int32_t clGetDeviceInfo(ClDevice device, uint32_t key, size_t size, void *out, size_t *needed) {
  int32_t code = REAL(GetDeviceInfo)(device, key, size, out, needed);
  if (key == CL_MAX_GROUP && fault("small groups")) *(size_t *)out = 16;
  if (key == CL_PROFILE && fault("embedded")) snprintf(out, size, "EMBEDDED_PROFILE");
  if (key == CL_COMPILER && fault("no compiler")) *(uint32_t *)out = 0;
  if (key == CL_EXTENSIONS && fault("wrong dot"))
    strncat(out, " cl_qcom_dot_product8", size - strlen(out) - 1);
  if (key == CL_EXTENSIONS && fault("absent dot"))
    strncat(out, " cl_khr_integer_dot_product", size - strlen(out) - 1);
  return code;
}

ClProgram clCreateProgramWithSource(ClContext context, uint32_t count, const char **texts,
                                    const size_t *lengths, int32_t *code) {
  const char *before = fault("wrong dot")    ? "#define qcom_dot8_acc(a, w, c) ((c) + 1)\n"
                       : fault("no fma")     ? "#define fma(a, b, c) ((a) * (b) + (c) * 0.5f)\n"
                       : fault("bad source") ? "this is no OpenCL C\n"
                       : fault("no barrier") ? "#define barrier(fence)\n"
                                             : "";
  const char *both[] = {before, texts[0]};
  const size_t sizes[] = {strlen(before), lengths[0]};
  (void)count;
  if (!before[0]) return REAL(CreateProgramWithSource)(context, 1, texts, lengths, code);
  return REAL(CreateProgramWithSource)(context, 2, both, sizes, code);
}

ClMem clCreateBuffer(ClContext context, uint64_t flags, size_t size, void *host, int32_t *code) {
  if (host && flags & (uint64_t)CL_USE_HOST && fault("copies"))
    flags = (flags & ~(uint64_t)CL_USE_HOST) | (uint64_t)CL_COPY_HOST;
  if ((flags & (uint64_t)CL_ALLOC_HOST && fault("no room")) ||
      (flags & (uint64_t)CL_READ_ONLY && fault("no weights"))) {
    *code = (int32_t)CL_NO_MEMORY;
    return NULL;
  }
  return REAL(CreateBuffer)(context, flags, size, host, code);
}

/* Oclgrind's record of what was written knows nothing of a release: a new buffer in the old one's
 * place would be judged by the old one's size. With all kept, each has a place of its own. */
int32_t clReleaseMemObject(ClMem mem) { return fault("keep") ? 0 : REAL(ReleaseMemObject)(mem); }

int32_t clEnqueueNDRangeKernel(ClQueue queue, ClKernel kernel, uint32_t axes, const size_t *offset,
                               const size_t *global, const size_t *local, uint32_t waits,
                               const ClEvent *before, ClEvent *event) {
  static int left = 6; /* those at the start come through */
  if (fault("lost") && left-- <= 0) return (int32_t)CL_NO_RESOURCES;
  return REAL(EnqueueNDRangeKernel)(queue, kernel, axes, offset, global, local, waits, before,
                                    event);
}
