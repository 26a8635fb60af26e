/* Launching the CUDA kernels: which kernel, which grid, which scratch memory. Knows nothing of ONNX
 * Runtime, so that a benchmark can call it as the plugin does.
 *
 * The driver is reached by dlopen and declared here by us (CUDA driver API 12.4 and later). */
#ifndef BITCOMPILE_CUDA_LAUNCH_H
#define BITCOMPILE_CUDA_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

enum { BC_MAX_GPUS = 16, BC_MOST_KERNELS = 64, BC_NO_GATE = -1, BC_MMA_TILE = -1 };
/* Device code for one architecture; PTX has major 0. Generated with the list of kernels. */
typedef struct bc_image {
  const char *name;
  int major, minor, exact; /* exact: runs on this minor version only */
  const void *data;
} bc_image;
extern const bc_image bc_images[];
extern const int bc_image_count;
extern const char *const bc_kernel_names[];
extern const int bc_kernel_count;

typedef struct bc_gpu {
  int device, major, minor, processors, shared_limit, ready;
  const bc_image *image;
  void *kernel[BC_MOST_KERNELS]; /* NULL where the architecture has none */
} bc_gpu;

/* y [M, N] = W quantise(norm(gate(x))) with scale, gate, bias and residual; NULL for none. */
typedef struct bc_linear {
  const void *x; /* [M, K] of type_x; with gate_in >= 0 float32 [M, 2K]: act(gate) * up */
  const float *gamma;
  const uint32_t *w;
  const float *w_scale, *bias;
  const void *residual; /* [M, N] of type_y */
  void *y;
  int32_t M, N, K;
  int32_t type_x, type_y;    /* ONNX element types */
  int32_t gate_in, gate_out; /* gate_out: W has 2N rows and y is act(gate) * up */
  int32_t group_size; /* columns under one scale, a multiple of 16; 0: a whole row. With groups
                         w_scale is [ceil(N / 16), G, 16] */
  float eps;
  int32_t early;     /* weights and bias are constants: read while the kernel before still runs */
  int32_t quantised; /* scratch holds the quantised rows already, of a call with the same job */
  /* To compare: 0 leaves the choice here. With groups, tile 1 is for few tokens, and split leaves
   * out Hopper's own kernel. */
  int32_t step;  /* row tiles of a block, with few tokens */
  int32_t tile;  /* number in BC_TILES, from 1; BC_MMA_TILE: mma.sync */
  int32_t split; /* one token: norm and product in kernels of their own */
} bc_linear;

/* y [M, V] float32 = logits of x [M, K] of type_x against a table [V, B, block * bits / 8] */
typedef struct bc_table {
  const void *x, *table;
  const float *scale; /* [V, B] */
  float *y;
  int32_t M, V, K, type_x, bits, block, early;
} bc_table;

/* The GPU of the calling thread's context, ready to launch; NULL and *error if there is none. */
const bc_gpu *bc_cuda_gpu(const char **error);
/* Loads the driver; a text that names the remedy if there is none. */
const char *bc_cuda_open(void);
/* What the driver says about a result other than 0. */
const char *bc_cuda_error(int result);

/* Bytes of scratch memory a launch needs, aligned to 256. */
int64_t bc_cuda_linear_scratch(const bc_gpu *gpu, const bc_linear *job);
/* Put a job on a stream: 0, or the driver's error. */
int bc_cuda_linear(const bc_gpu *gpu, void *stream, const bc_linear *job, void *scratch);
/* The same for a head. */
int64_t bc_cuda_head_scratch(const bc_table *job);
int bc_cuda_head(const bc_gpu *gpu, void *stream, const bc_table *job, void *scratch);
/* Read `bytes` of memory and do nothing with them; out has room for a word. */
int bc_cuda_read(const bc_gpu *gpu, void *stream, const void *data, int64_t bytes, void *out);
/* Whether a product can gate its own result. */
int bc_cuda_gates(const bc_gpu *gpu, const bc_linear *job);

#endif
