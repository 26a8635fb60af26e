/* What every device's operators share: tensors, checks, and how a device is described.
 *
 * All checks are made in Compute, because ONNX Runtime swallows errors of shape inference. Names
 * with external linkage begin with bc_: a static build lives in somebody else's program. */
#ifndef BITCOMPILE_OPS_H
#define BITCOMPILE_OPS_H

#include <stddef.h>
#include <stdint.h>

#include "ort_abi.h"

enum {
  MAX_INPUTS = 8,
  MAX_RANK = 8,
  MAX_K = 1 << 18,  /* int32 sums of field values stay below 2**31 */
  MAX_N = 1 << 23,  /* and so do the kernels' int32 offsets, over the rows of a task */
  MAX_BLOCK = 8192, /* int32 sums of a head block: 512 codes a lane * 255 * 16256 */
};

#define TRY(expression)               \
  do {                                \
    BcStatus *status_ = (expression); \
    if (status_) return status_;      \
  } while (0)

static inline int64_t bc_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t bc_max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t bc_min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* Roof is not part of the model operators: `bitcompile bench` compares with it. */
enum { BC_BIT_LINEAR, BC_NORM_BIT_LINEAR, BC_BIT_GLU, BC_HEAD_LINEAR, BC_ROOF, BC_OPS };
enum { BC_RELU2, BC_SILU, BC_GELU_TANH, BC_GELU_ERF, BC_ACTIVATIONS };

typedef struct Spec { /* one operator's interface, the same on every device */
  const char *name;
  size_t inputs;
  uint32_t bytes_inputs; /* bit i set: input i is uint8 */
  uint32_t typed_inputs; /* bit i set: input i has the activations' type; others are float32 */
  int has_norm;          /* takes attribute eps */
  int output;            /* element type, 0 for the activations' */
} Spec;

typedef struct Tensor {
  const void *data;
  size_t rank;
  int64_t dim[MAX_RANK];
} Tensor;

typedef struct Device Device;

enum { BC_I2, BC_T5, BC_CODINGS }; /* four weights a byte, five */

typedef struct Layout { /* how weights lie in memory: bitcompile/packing.py */
  const char *id;
  int64_t tile_rows, tile_columns, tile_bytes;
  int coding; /* BC_I2 ... */
} Layout;

typedef struct Kernel { /* one node; read-only after its creation, so that Compute is re-entrant */
  const BcApi *api;
  const Device *device;
  const void *state; /* of the registration: what Device.open gave */
  const Spec *spec;
  const Layout *layout; /* of the weights, NULL where a node has none */
  int op;               /* BC_BIT_LINEAR ... */
  int type;             /* element type of the activations */
  int64_t K, N, F, F2, act_bits, bits, block, sub_norm, activation, kind, steps;
  int64_t group_size; /* columns that share a scale, 0 for a whole row */
  float eps;
  uint32_t constant; /* bit i set: input i is a constant, parsed once */
  Tensor fixed[MAX_INPUTS];
  void *own; /* what Device.attach made */
} Kernel;

typedef BcStatus *bc_compute_fn(const Kernel *, BcContext *);

/* What runs the operators. */
struct Device {
  const char *provider; /* execution provider, NULL for the CPU's */
  const int *types;     /* element types of activations that it has kernels for, up to a 0 */
  int remote;           /* tensors lie in memory that the host cannot read */
  /* Once a registration: `state` of its kernels, which is never freed. */
  BcStatus *(*open)(const BcApi *, const void **state);
  bc_compute_fn *compute[BC_OPS]; /* NULL for an operator it does not have */
  /* Around a node's life, if not NULL: its constants on the device, in `own`. */
  BcStatus *(*attach)(Kernel *);
  void (*detach)(Kernel *);
};

extern const Device *const bc_device; /* the plugin's, chosen by its generated table */
/* That its kernels read, generated too, up to one without an id. */
extern const Layout bc_layouts[];
extern const Device bc_cpu_device, bc_opencl_device, bc_cuda_device;

/* An ORT status with a formatted text that names the remedy. */
BcStatus *bc_fail(const BcApi *api, int code, const char *format, ...);

int64_t bc_elements(const Tensor *t);
BcStatus *bc_parse_tensor(const Kernel *k, size_t index, const BcValue *value, Tensor *out);
/* in: MAX_INPUTS tensors */
BcStatus *bc_read_inputs(const Kernel *k, BcContext *context, Tensor *in);
BcStatus *bc_expect(const Kernel *k, const char *what, const Tensor *t, size_t rank,
                    const int64_t *dim);
/* Scales along K columns. */
int64_t bc_groups(const Kernel *k, int64_t K);
BcStatus *bc_expect_weight(const Kernel *k, const char *what, const Tensor *w,
                           const char *scale_name, const Tensor *scale, int64_t N, int64_t K);
/* An optional input: NULL if it is the rank-0 zero that means "absent". Memory that the host cannot
 * read is judged by its rank. */
BcStatus *bc_optional(const Kernel *k, const char *what, const Tensor *t, size_t rank,
                      const int64_t *dim, const void **out);
/* A call of a model operator: checked inputs, output, and what may be absent (then NULL). */
typedef struct Node {
  Tensor in[MAX_INPUTS], y;
  int64_t M; /* rows */
  const float *bias, *residual;
} Node;
BcStatus *bc_open_node(const Kernel *k, BcContext *context, Node *out);
/* Index of a linear operator's weight: NormBitLinear has gamma before it. */
static inline size_t bc_weight_index(const Kernel *k) {
  return k->op == BC_NORM_BIT_LINEAR ? 2 : 1;
}
/* x [..., K]: checks its last dimension, allocates y [..., N], counts rows. */
BcStatus *bc_open_rows(const Kernel *k, BcContext *context, const Tensor *x, int64_t K, int64_t N,
                       Tensor *y, int64_t *M);

#endif
