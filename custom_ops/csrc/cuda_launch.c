/* See cuda_launch.h. Sizes follow targets/tir/cuda; cuda_kernels.h is generated from it. */
#include "cuda_launch.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <string.h>

#include "cuda_kernels.h"

enum {
  UNIT_COLUMNS = 128,
  TILE_ROWS = 16,
  TOKENS = 8,
  TOKEN_UNIT = 1024,
  GEMM_TOKENS = 128,
  MOST_TOKENS = 256, /* of any tile: activations are padded to it */
  ALIGN = 256,
  BLOCK_UNITS = 6 * BC_DECODE_WARPS,
  MOST_STEP = 8, /* a thread of the block stores one row */
  MIN_MAJOR = 8,
};

/* ---- the driver ------------------------------------------------------------------------------ */

typedef struct Attribute { /* CUlaunchAttribute */
  int id, pad;
  union {
    int on;
    char bytes[64];
  } value;
} Attribute;
typedef struct Config { /* CUlaunchConfig */
  unsigned grid[3], block[3], shared;
  void *stream;
  Attribute *attributes;
  unsigned attribute_count;
} Config;
enum { /* CUdevice_attribute, CUfunction_attribute, CUlaunchAttributeID */
       PROCESSORS = 16,
       MAJOR = 75,
       MINOR = 76,
       SHARED_LIMIT = 97,
       STATIC_SHARED = 1,
       DYNAMIC_SHARED = 8,
       OVERLAP = 6,
};

#define DRIVER(X)                                                                \
  X(cuInit, (unsigned))                                                          \
  X(cuDeviceGetCount, (int *))                                                   \
  X(cuDeviceGetAttribute, (int *, int, int))                                     \
  X(cuCtxGetDevice, (int *))                                                     \
  X(cuLibraryLoadData,                                                           \
    (void **, const void *, void *, void *, unsigned, void *, void *, unsigned)) \
  X(cuLibraryGetKernel, (void **, void *, const char *))                         \
  X(cuKernelGetAttribute, (int *, int, void *, int))                             \
  X(cuKernelSetAttribute, (int, int, void *, int))                               \
  X(cuLaunchKernelEx, (const Config *, void *, void **, void **))                \
  X(cuGetErrorString, (int, const char **))
#define FIELD(name, parameters) int(*name) parameters;
static struct {
  void *library;
  DRIVER(FIELD)
  int count;
  bc_gpu gpu[BC_MAX_GPUS];
} cuda;
static atomic_flag lock = ATOMIC_FLAG_INIT;

const char *bc_cuda_error(int result) {
  const char *text = "unknown error";
  if (cuda.cuGetErrorString) cuda.cuGetErrorString(result, &text);
  return text;
}

static const char *load_driver(void) {
  int result;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library)
    return "no NVIDIA driver (libcuda.so.1) on this machine: install it, or build the artifact "
           "with "
           "--target native";
#define FIND(name, parameters)                  \
  *(void **)&cuda.name = dlsym(library, #name); \
  if (!cuda.name) return "the NVIDIA driver lacks " #name ": install driver 550 or newer";
  DRIVER(FIND)
  if ((result = cuda.cuInit(0)) || (result = cuda.cuDeviceGetCount(&cuda.count)))
    return bc_cuda_error(result);
  if (!cuda.count) return "no NVIDIA GPU: check nvidia-smi";
  if (cuda.count > BC_MAX_GPUS) cuda.count = BC_MAX_GPUS;
  for (int d = 0; d < cuda.count; d++) {
    bc_gpu *gpu = &cuda.gpu[d];
    gpu->device = d;
    cuda.cuDeviceGetAttribute(&gpu->major, MAJOR, d);
    cuda.cuDeviceGetAttribute(&gpu->minor, MINOR, d);
    cuda.cuDeviceGetAttribute(&gpu->processors, PROCESSORS, d);
    cuda.cuDeviceGetAttribute(&gpu->shared_limit, SHARED_LIMIT, d);
  }
  cuda.library = library;
  return NULL;
}

const char *bc_cuda_open(void) {
  while (atomic_flag_test_and_set(&lock)) continue;
  const char *error = cuda.library ? NULL : load_driver();
  atomic_flag_clear(&lock);
  return error;
}

/* Machine code of this or a lower minor version, else PTX, which the driver compiles. */
static const bc_image *choose_image(const bc_gpu *gpu) {
  const bc_image *best = NULL;
  for (int i = 0; i < bc_image_count; i++) {
    const bc_image *image = &bc_images[i];
    int ptx = !image->major;
    int fits = image->major == gpu->major &&
               (image->exact ? image->minor == gpu->minor : image->minor <= gpu->minor);
    if (!ptx && !fits) continue;
    if (!best || !best->major || (!ptx && image->minor > best->minor)) best = image;
  }
  return best;
}

static const char *prepare(bc_gpu *gpu) {
  void *library = NULL;
  int result, fixed = 0;
  if (gpu->major < MIN_MAJOR)
    return "the GPU is too old: compute capability 8.0 or newer is needed";
  gpu->image = choose_image(gpu);
  if ((result = cuda.cuLibraryLoadData(&library, gpu->image->data, NULL, NULL, 0, NULL, NULL, 0)))
    return bc_cuda_error(result);
  for (int i = 0; i < BC_CUDA_KERNELS; i++) {
    if (cuda.cuLibraryGetKernel(&gpu->kernel[i], library, bc_kernel_names[i])) {
      gpu->kernel[i] = NULL;
      continue;
    }
    result = cuda.cuKernelGetAttribute(&fixed, STATIC_SHARED, gpu->kernel[i], gpu->device);
    if (!result)
      result = cuda.cuKernelSetAttribute(DYNAMIC_SHARED, gpu->shared_limit - fixed, gpu->kernel[i],
                                         gpu->device);
    if (result) return bc_cuda_error(result);
  }
  gpu->ready = 1;
  return NULL;
}

const bc_gpu *bc_cuda_gpu(const char **error) {
  int device = 0, result = cuda.cuCtxGetDevice(&device);
  *error = result ? bc_cuda_error(result) : device >= cuda.count ? "too many GPUs" : NULL;
  if (*error) return NULL;
  while (atomic_flag_test_and_set(&lock)) continue;
  if (!cuda.gpu[device].ready) *error = prepare(&cuda.gpu[device]);
  atomic_flag_clear(&lock);
  return *error ? NULL : &cuda.gpu[device];
}

static int launch(const bc_gpu *gpu, void *stream, int kernel, int64_t x, int64_t y, int threads,
                  int64_t shared, void **arguments, int early) {
  Attribute overlap = {.id = OVERLAP, .value.on = 1};
  Config config = {.grid = {(unsigned)x, (unsigned)y, 1},
                   .block = {(unsigned)threads, 1, 1},
                   .shared = (unsigned)shared,
                   .stream = stream,
                   .attributes = &overlap,
                   .attribute_count = early && gpu->major >= 9};
  return cuda.cuLaunchKernelEx(&config, gpu->kernel[kernel], arguments, NULL);
}

/* ---- products -------------------------------------------------------------------------------- */

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t padded(int64_t bytes) { return ceil_div(bytes, ALIGN) * ALIGN; }
static int32_t least(int64_t a, int64_t b) { return (int32_t)(a < b ? a : b); }
static int32_t units_of(const bc_linear *job) { return (int32_t)ceil_div(job->K, UNIT_COLUMNS); }
static int32_t pairs_of(const bc_linear *job) { return job->gate_out >= 0 ? 2 : 1; }

/* Row tiles of a decode block. Where kernels overlap, some six units a warp, but no more than two
 * blocks for five multiprocessors need: the next kernel's blocks load their weights beside them
 * (measured on an H100). Else a block for each multiprocessor. */
static int32_t step_of(const bc_gpu *gpu, const bc_linear *job) {
  if (job->step) return job->step;
  int64_t tiles = ceil_div(job->N, TILE_ROWS), most = MOST_STEP / pairs_of(job);
  if (!job->early || gpu->major < 9) return least(ceil_div(tiles, gpu->processors), most);
  int64_t fits = BLOCK_UNITS / ((int64_t)units_of(job) * pairs_of(job));
  int32_t step = least(least(ceil_div(5 * tiles, 2 * gpu->processors), fits), most);
  return step < 1 ? 1 : step;
}

enum { FUSED = -1 };

static int64_t decode_shared(const bc_gpu *gpu, const bc_linear *job, int kind) {
  int64_t words = (int64_t)units_of(job) * UNIT_COLUMNS / 4, tokens = kind == FUSED ? 1 : kind;
  int64_t slots = (int64_t)step_of(gpu, job) * pairs_of(job) * TILE_ROWS;
  int64_t row = kind == FUSED ? 4 * (ceil_div(words, 128) * 128 + words) : 0;
  return 4 * ((words + BC_DECODE_ROW_PAD + slots) * tokens + slots + row);
}

static int aligned(const void *p) { return ((uintptr_t)p & 15) == 0; }

/* The decode kernel for a job: FUSED, or its tokens; 0 if it takes a gemm. */
static int decode_kind(const bc_gpu *gpu, const bc_linear *job) {
  static const int kinds[] = {1, 8, 16};
  int64_t room = gpu->shared_limit - 1024;
  int alone = job->M == 1 && job->gate_in < 0 && !job->quantised;
  if (alone && aligned(job->x) && aligned(job->gamma) && decode_shared(gpu, job, FUSED) <= room)
    return FUSED;
  for (int i = 0; i < 3; i++)
    if (job->M <= kinds[i] && decode_shared(gpu, job, kinds[i]) <= room) return kinds[i];
  return 0;
}

int bc_cuda_gates(const bc_gpu *gpu, const bc_linear *job) {
  return job->N % TILE_ROWS == 0 && decode_kind(gpu, job);
}

typedef struct Tokens { /* quantised activations in scratch memory */
  int8_t *q;
  float *s;
  int32_t *qsum;
  int32_t groups;
} Tokens;

static int32_t groups_of(int64_t M) {
  int64_t tile = M <= 2 * TOKENS ? TOKENS : MOST_TOKENS;
  return (int32_t)(ceil_div(M, tile) * (tile / TOKENS));
}

int64_t bc_cuda_linear_scratch(const bc_gpu *gpu, const bc_linear *job) {
  if (decode_kind(gpu, job) == FUSED) return 0;
  int64_t q = (int64_t)units_of(job) * groups_of(job->M) * TOKEN_UNIT;
  return padded(q) + 2 * padded((int64_t)job->M * 4);
}

static Tokens take_tokens(const bc_linear *job, void *scratch) {
  Tokens t = {.q = scratch, .groups = groups_of(job->M)};
  t.s = (float *)(t.q + padded((int64_t)units_of(job) * t.groups * TOKEN_UNIT));
  t.qsum = (int32_t *)((char *)t.s + padded((int64_t)job->M * 4));
  return t;
}

static int quantise(const bc_gpu *gpu, void *stream, const bc_linear *job, const Tokens *to) {
  bc_rows_args a = {.x = job->x,
                    .gamma = job->gamma,
                    .q = to->q,
                    .s = to->s,
                    .qsum = to->qsum,
                    .K = job->K,
                    .Kp = units_of(job) * UNIT_COLUMNS,
                    .token_groups = to->groups,
                    .type = job->type_x,
                    .has_norm = job->gamma != NULL,
                    .activation = job->gate_in,
                    .eps = job->eps};
  int64_t room = 4 * (ceil_div(job->K, 512) * 512 + (job->gate_in >= 0 ? BC_ROWS_PART : 0));
  int fast = job->K <= BC_ROWS_LONGEST && job->K % 4 == 0 && aligned(job->x) && aligned(job->gamma);
  return launch(gpu, stream, fast ? BC_CUDA_ROWS : BC_CUDA_ANY_ROWS, job->M, 1, BC_ROWS_THREADS,
                fast ? room : 0, (void *[])BC_ROWS_ARGS(a), job->early);
}

static int decode(const bc_gpu *gpu, void *stream, const bc_linear *job, const Tokens *from,
                  int kind) {
  int32_t tiles = (int32_t)ceil_div(job->N, TILE_ROWS), step = step_of(gpu, job);
  bc_decode_args a = {.x = job->x,
                      .gamma = job->gamma,
                      .q = from->q,
                      .s = from->s,
                      .qsum = from->qsum,
                      .w = job->w,
                      .w_scale = job->w_scale,
                      .bias = job->bias,
                      .residual = job->residual,
                      .y = job->y,
                      .M = job->M,
                      .N = job->N,
                      .K = job->K,
                      .units = units_of(job),
                      .token_groups = from->groups,
                      .tiles = tiles,
                      .step = step,
                      .pairs = pairs_of(job),
                      .type_x = job->type_x,
                      .type_y = job->type_y,
                      .has_norm = job->gamma != NULL,
                      .has_bias = job->bias != NULL,
                      .has_residual = job->residual != NULL,
                      .activation = job->gate_out,
                      .eps = job->eps};
  int kernel = kind == FUSED ? BC_CUDA_FUSED
               : kind == 1   ? BC_CUDA_DECODE1
               : kind == 8   ? BC_CUDA_DECODE8
                             : BC_CUDA_DECODE16;
  return launch(gpu, stream, kernel, ceil_div(tiles, step), 1, BC_DECODE_WARPS * 32,
                decode_shared(gpu, job, kind), (void *[])BC_DECODE_ARGS(a), job->early);
}

typedef struct Schedule { /* of a product with many tokens */
  int kernel, tokens, threads, residents, stages, align;
  double speed; /* relative to the best, of a full machine */
} Schedule;
static const Schedule mma = {BC_CUDA_GEMM, GEMM_TOKENS, BC_GEMM_THREADS, 2, BC_GEMM_STAGES, 0, 1.0};
static const Schedule hopper[] = {
    {BC_CUDA_WGMMA256, 256, BC_WGMMA_THREADS, 1, BC_WGMMA256_STAGES, 1024, 0.9},
    {BC_CUDA_WGMMA128, 128, BC_WGMMA_THREADS, 2, BC_WGMMA128_STAGES, 1024, 1.0},
    {BC_CUDA_WGMMA64, 64, BC_WGMMA_THREADS, 2, BC_WGMMA64_STAGES, 1024, 0.75},
};

/* The schedule whose waves of blocks cost least. */
static const Schedule *choose_schedule(const bc_gpu *gpu, const bc_linear *job) {
  const Schedule *best = &mma;
  double least_cost = 0;
  if (!gpu->kernel[BC_CUDA_WGMMA256] || job->tile == BC_MMA_TILE) return best;
  for (size_t i = 0; i < sizeof hopper / sizeof *hopper; i++) {
    const Schedule *h = &hopper[i];
    int64_t blocks = ceil_div(job->N, BC_GEMM_ROWS) * ceil_div(job->M, h->tokens);
    int64_t waves = ceil_div(blocks, (int64_t)gpu->processors * h->residents);
    double cost = (double)(waves * h->residents * h->tokens) / h->speed;
    if (job->tile == h->tokens) return h;
    if (i && cost >= least_cost) continue;
    best = h;
    least_cost = cost;
  }
  return best;
}

static int multiply(const bc_gpu *gpu, void *stream, const bc_linear *job, const Tokens *from) {
  const Schedule *h = choose_schedule(gpu, job);
  bc_gemm_args a = {.q = from->q,
                    .s = from->s,
                    .qsum = from->qsum,
                    .w = job->w,
                    .w_scale = job->w_scale,
                    .bias = job->bias,
                    .residual = job->residual,
                    .y = job->y,
                    .M = job->M,
                    .N = job->N,
                    .units = units_of(job),
                    .token_groups = from->groups,
                    .tiles = (int32_t)ceil_div(job->N, TILE_ROWS),
                    .type_y = job->type_y,
                    .has_bias = job->bias != NULL,
                    .has_residual = job->residual != NULL};
  int64_t stages = (int64_t)h->stages * h->tokens * UNIT_COLUMNS;
  int64_t finished = (int64_t)h->tokens * BC_GEMM_OUT_STRIDE * 4;
  return launch(gpu, stream, h->kernel, ceil_div(job->N, BC_GEMM_ROWS), ceil_div(job->M, h->tokens),
                h->threads, (stages > finished ? stages : finished) + h->align,
                (void *[])BC_GEMM_ARGS(a), job->early);
}

int bc_cuda_linear(const bc_gpu *gpu, void *stream, const bc_linear *job, void *scratch) {
  int kind = decode_kind(gpu, job);
  Tokens none = {0};
  if (kind == FUSED) return decode(gpu, stream, job, &none, kind);
  Tokens quantised = take_tokens(job, scratch);
  int result = job->quantised ? 0 : quantise(gpu, stream, job, &quantised);
  if (result) return result;
  return kind ? decode(gpu, stream, job, &quantised, kind) : multiply(gpu, stream, job, &quantised);
}

int bc_cuda_read(const bc_gpu *gpu, void *stream, const void *data, int64_t bytes, void *out) {
  bc_read_args a = {.data = data, .out = out, .loads = (int32_t)(bytes / 16)};
  int64_t blocks = ceil_div(a.loads, BC_READ_THREADS * BC_READ_LOADS);
  return launch(gpu, stream, BC_CUDA_READ, blocks, 1, BC_READ_THREADS, 0, (void *[])BC_READ_ARGS(a),
                0);
}
