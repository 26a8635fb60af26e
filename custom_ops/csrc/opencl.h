/* One OpenCL device: what opencl_driver.c opens and opencl.c runs the operators on. */
#ifndef BITCOMPILE_OPENCL_H
#define BITCOMPILE_OPENCL_H

#include "opencl_abi.h"
#include "ops.h"

/* ---- the generated table (targets/tir/opencl/plugin.py) -------------------------------------- */

enum {
  CLK_QUANTIZE,
  CLK_NORM_QUANTIZE,
  CLK_GROUP_SUMS,
  CLK_GEMV,
  CLK_GEMM,
  CLK_GEMV_GROUPED,
  CLK_GEMM_GROUPED,
  CLK_GLU, /* BC_ACTIVATIONS of them */
  CLK_HEAD_QUANTIZE8 = CLK_GLU + BC_ACTIVATIONS,
  CLK_HEAD_QUANTIZE4,
  CLK_HEAD8,
  CLK_HEAD4,
  CLK_PROBE,
  CLK_KERNELS
};

typedef struct bc_cl_kernel {
  const char *name;
  int32_t items[2]; /* of a work-group */
  int32_t rows[2];  /* of the output that a work-group computes: along its first axis, its second */
} bc_cl_kernel;

extern const char bc_cl_target[];                /* its name, which BITCOMPILE_ISA may hold */
extern const char bc_cl_source[], bc_cl_probe[]; /* OpenCL C: all kernels; the probe alone */
extern const bc_cl_kernel bc_cl_kernels[CLK_KERNELS];

/* The CPU kernels of the same plugin; both NULL without them. */
extern const Device *const bc_cl_cpu;
typedef BcStatus *bc_open_fn(const BcApi *, const char *wanted, const void **state);
extern bc_open_fn *const bc_cl_cpu_open;

/* Which calls go to the device: auto, none, prefill, all. */
extern const char bc_cl_offload[];

/* ---- the device ------------------------------------------------------------------------------ */

enum {
  BUFFER_IN,
  BUFFER_Q,
  BUFFER_LO,
  BUFFER_S,
  BUFFER_SUMS,
  BUFFER_BOTH,
  BUFFER_HIDDEN,
  BUFFER_OUT,
  BUFFERS
};

typedef struct Buffer { /* grows to the largest size asked for */
  ClMem mem;
  size_t bytes;
} Buffer;

typedef struct Cl {
  void *library;
  ClApi api;
  ClDevice device;
  ClContext context;
  ClQueue queue; /* in order: every command sees what the earlier ones left */
  ClProgram program;
  ClKernel kernel[CLK_KERNELS];
  char name[160], driver[160];
  int dot;       /* the dot product it uses, BC_DOT of prelude.cl */
  int unified;   /* host and device share memory */
  int zero_copy; /* a kernel sees host memory itself, not the driver's copy */
  int from_cache;
  size_t largest, align; /* bytes of an allocation; of an address the device reads in place */
  Buffer buffer[BUFFERS];
  int broken;       /* a command failed: nothing more is sent */
  char fault[1024]; /* the first failure, and the remedy */
} Cl;

/* Records a failure (the first one stays) and returns 1. */
int bc_cl_fault(Cl *cl, const char *format, ...);
/* "out of memory (-4)" */
const char *bc_cl_error(int32_t code, char *text, size_t size);
/* Opens the driver, a device and the program. Returns 1 with cl->fault set if that fails. */
int bc_cl_open(Cl *cl);
/* Enqueues kernel `which` over groups[0] x groups[1] work-groups. `types`: a letter for each
 * argument that follows: b ClMem, i int32_t, f float. */
int bc_cl_launch(Cl *cl, int which, int64_t groups_x, int64_t groups_y, const char *types, ...);
/* Room for `bytes` in a buffer. */
int bc_cl_room(Cl *cl, int which, int64_t bytes);
/* A read-only buffer of host memory that outlives it: in place if the device can, else copied. */
ClMem bc_cl_constant(Cl *cl, const void *data, size_t bytes);

#endif
