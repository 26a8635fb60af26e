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
  MOST_STEP = 8, /* a thread of the block stores one row */
  MIN_MAJOR = 8,
  FLOAT = 1, /* ONNX element type */
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
       CARVEOUT = 9,
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

typedef struct Fused { /* kernels of one token: units of a warp, warps of the row, tiles of a block
                        */
  int kernel, share, most_warps, most_tiles, wide, gate;
} Fused;
static const Fused fused_ways[] = {BC_FUSED_WAYS};
enum { FUSED_WAYS = sizeof fused_ways / sizeof *fused_ways };

const char *bc_cuda_error(int result) {
  const char *text = "unknown error";
  if (cuda.cuGetErrorString) cuda.cuGetErrorString(result, &text);
  return text;
}

static const char *load_driver(void) {
  int result;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library)
    return "no NVIDIA driver (libcuda.so.1) on this machine: install it, build the artifact with "
           "--target native, load with plugin=False, or verify with --fallback";
#define FIND(name, parameters)                  \
  *(void **)&cuda.name = dlsym(library, #name); \
  if (!cuda.name) return "the NVIDIA driver lacks " #name ": install driver 580 or newer";
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
  for (int i = 0; i < bc_kernel_count; i++) {
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
  /* A multiprocessor with another split of its memory takes none of their blocks before it is idle.
   */
  for (int i = 0; i < FUSED_WAYS; i++)
    if (gpu->kernel[fused_ways[i].kernel])
      cuda.cuKernelSetAttribute(CARVEOUT, 100, gpu->kernel[fused_ways[i].kernel], gpu->device);
  gpu->ready = 1;
  return NULL;
}

const bc_gpu *bc_cuda_gpu(const char **error) {
  int device = 0, result = cuda.cuCtxGetDevice(&device);
  *error = result                 ? bc_cuda_error(result)
           : device >= cuda.count ? "too many GPUs: name some in CUDA_VISIBLE_DEVICES"
                                  : NULL;
  if (*error) return NULL;
  while (atomic_flag_test_and_set(&lock)) continue;
  if (!cuda.gpu[device].ready) *error = prepare(&cuda.gpu[device]);
  atomic_flag_clear(&lock);
  return *error ? NULL : &cuda.gpu[device];
}

/* Whether a job may overlap the kernel before. PTX is of version 8, whose code waits for nobody. */
static int overlaps(const bc_gpu *gpu, int early) { return early && gpu->image->major >= 9; }

static int launch(const bc_gpu *gpu, void *stream, int kernel, int64_t x, int64_t y, int threads,
                  int64_t shared, void **arguments, int early) {
  Attribute overlap = {.id = OVERLAP, .value.on = 1};
  Config config = {.grid = {(unsigned)x, (unsigned)y, 1},
                   .block = {(unsigned)threads, 1, 1},
                   .shared = (unsigned)shared,
                   .stream = stream,
                   .attributes = &overlap,
                   .attribute_count = (unsigned)overlaps(gpu, early)};
  return cuda.cuLaunchKernelEx(&config, gpu->kernel[kernel], arguments, NULL);
}

/* ---- products -------------------------------------------------------------------------------- */

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t padded(int64_t bytes) { return ceil_div(bytes, ALIGN) * ALIGN; }
static int32_t least(int64_t a, int64_t b) { return (int32_t)(a < b ? a : b); }
static int32_t units_of(const bc_linear *job) { return (int32_t)ceil_div(job->K, UNIT_COLUMNS); }
static int32_t pairs_of(const bc_linear *job) { return job->gate_out >= 0 ? 2 : 1; }

/* Row tiles of a block, for 2 to 16 tokens: one block for each multiprocessor, or, where kernels
 * overlap, the shares that were best for single tokens on an H100 before these had kernels of their
 * own; not measured again. */
static int32_t step_of(const bc_gpu *gpu, const bc_linear *job) {
  if (job->step) return job->step;
  int64_t tiles = ceil_div(job->N, TILE_ROWS), most = MOST_STEP / pairs_of(job);
  int64_t blocks = gpu->processors;
  if (overlaps(gpu, job->early))
    blocks = job->gate_out >= 0 ? blocks * 5 / 3 : blocks * 5 / (job->type_x == FLOAT ? 16 : 8);
  return least(ceil_div(tiles, blocks ? blocks : 1), most);
}

static int64_t decode_shared(const bc_gpu *gpu, const bc_linear *job, int tokens) {
  int64_t words = (int64_t)units_of(job) * UNIT_COLUMNS / 4;
  int64_t slots = (int64_t)step_of(gpu, job) * pairs_of(job) * TILE_ROWS;
  return 4 * ((words + BC_DECODE_ROW_PAD + slots) * tokens + slots);
}

/* The kernel for a row of this length; NULL if there is none. */
static const Fused *fused_way(const bc_linear *job) {
  for (int i = 0; i < FUSED_WAYS; i++) {
    const Fused *way = &fused_ways[i];
    if (way->share * way->most_warps >= units_of(job) && way->wide == (job->type_x == FLOAT) &&
        way->gate == (job->gate_out >= 0))
      return way;
  }
  return NULL;
}

static int32_t fused_warps(const bc_linear *job, const Fused *way) {
  return (int32_t)ceil_div(units_of(job), way->share);
}

static int64_t fused_shared(const bc_gpu *gpu, const bc_linear *job, const Fused *way,
                            int64_t step) {
  int64_t slots = step * pairs_of(job), row = fused_warps(job, way) * way->share * UNIT_COLUMNS;
  int64_t needed = slots * units_of(job) * 512 + row + slots * TILE_ROWS * 16;
  /* No room for a third block: where one is free, two of the next kernel would share it. */
  int64_t third = job->early ? gpu->shared_limit / 3 : 0;
  return needed > third ? needed : third;
}

/* Row tiles of a block: one for each multiprocessor, if its memory holds their weights. */
static int32_t fused_step(const bc_gpu *gpu, const bc_linear *job, const Fused *way) {
  int64_t tiles = ceil_div(job->N, TILE_ROWS), wanted = ceil_div(tiles, gpu->processors);
  int32_t step = least(job->step ? job->step : wanted, way->most_tiles / pairs_of(job));
  while (step && fused_shared(gpu, job, way, step) > gpu->shared_limit - 1024) step--;
  return step;
}

static int aligned(const void *p) { return ((uintptr_t)p & 15) == 0; }

enum { FUSED = -1 };

/* Units of a warp of the product of one quantised row: the fewest with which there are no more than
 * 40 warps for each multiprocessor. */
static int32_t gemv_ahead(const bc_gpu *gpu, const bc_linear *job) {
  int64_t tiles = ceil_div(job->N, TILE_ROWS), all = gpu->processors * 40ll;
  for (int32_t ahead = 1; ahead < BC_GEMV_AHEAD; ahead++) {
    int64_t warps = ceil_div(units_of(job), ahead);
    if (warps <= BC_GEMV_MOST_WARPS && tiles * warps <= all) return ahead;
  }
  return BC_GEMV_AHEAD;
}

/* How a job with few tokens is done: FUSED, or its tokens; 0 if it takes a gemm. */
static int decode_kind(const bc_gpu *gpu, const bc_linear *job) {
  int64_t room = gpu->shared_limit - 1024;
  if (job->group_size) return 0;
  int alone = job->M == 1 && job->gate_in < 0 && !job->quantised && !job->split;
  const Fused *way = fused_way(job);
  if (alone && way && job->K % 4 == 0 && aligned(job->x) && aligned(job->gamma) &&
      fused_step(gpu, job, way))
    return FUSED;
  if (job->M == 1 && job->gate_out < 0 && job->K <= BC_GEMV_LONGEST) return 1;
  for (int tokens = 8; tokens <= 16; tokens += 8)
    if (job->M <= tokens && decode_shared(gpu, job, tokens) <= room) return tokens;
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

static int64_t bytes_of_tokens(const bc_linear *job) {
  int64_t units = (int64_t)units_of(job) * groups_of(job->M);
  /* The last tile of tokens may reach beyond. */
  return padded((units + (job->M > 2 * TOKENS ? MOST_TOKENS / TOKENS : 0)) * TOKEN_UNIT);
}

int64_t bc_cuda_linear_scratch(const bc_gpu *gpu, const bc_linear *job) {
  if (decode_kind(gpu, job) == FUSED) return 0;
  return bytes_of_tokens(job) + 2 * padded((int64_t)job->M * 4);
}

static Tokens take_tokens(const bc_linear *job, void *scratch) {
  Tokens t = {.q = scratch, .groups = groups_of(job->M)};
  t.s = (float *)(t.q + bytes_of_tokens(job));
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
                    .unit_bytes = decode_kind(gpu, job) == 1 ? UNIT_COLUMNS : TOKEN_UNIT,
                    .type = job->type_x,
                    .has_norm = job->gamma != NULL,
                    .activation = job->gate_in,
                    .eps = job->eps};
  int64_t room = job->gate_in < 0 ? 0 : 4 * ((int64_t)job->K + BC_ROWS_PART);
  int fast = job->K <= BC_ROWS_LONGEST && job->K % 4 == 0 && aligned(job->x) && aligned(job->gamma);
  return launch(gpu, stream, fast ? BC_ROWS : BC_ANY_ROWS, job->M, 1, BC_ROWS_THREADS,
                fast ? room : 0, (void *[])BC_ROWS_ARGS(a), job->early);
}

static int fused(const bc_gpu *gpu, void *stream, const bc_linear *job) {
  const Fused *way = fused_way(job);
  int32_t tiles = (int32_t)ceil_div(job->N, TILE_ROWS), step = fused_step(gpu, job, way);
  int32_t warps = fused_warps(job, way), ending = (int32_t)ceil_div(step * TILE_ROWS, 32);
  bc_fused_args a = {.x = job->x,
                     .w = job->w,
                     .gamma = job->gamma,
                     .w_scale = job->w_scale,
                     .units = units_of(job),
                     .tiles = tiles,
                     .step = step,
                     .warps = warps,
                     .ending = ending,
                     .K = job->K,
                     .N = job->N,
                     .type_x = job->type_x,
                     .has_norm = job->gamma != NULL,
                     .inverse = 1.0f / (float)job->K,
                     .eps = job->eps,
                     .bias = job->bias,
                     .residual = job->residual,
                     .y = job->y,
                     .type_y = job->type_y,
                     .has_bias = job->bias != NULL,
                     .has_residual = job->residual != NULL,
                     .activation = job->gate_out};
  return launch(gpu, stream, way->kernel, ceil_div(tiles, step), 1, (warps + ending + 1) * 32,
                fused_shared(gpu, job, way, step), (void *[])BC_FUSED_ARGS(a), job->early);
}

static int gemv(const bc_gpu *gpu, void *stream, const bc_linear *job, const Tokens *from) {
  int32_t units = units_of(job), ahead = gemv_ahead(gpu, job);
  int32_t warps = (int32_t)ceil_div(units, ahead);
  bc_gemv_args a = {.w = job->w,
                    .q = from->q,
                    .units = units,
                    .warps = warps,
                    .N = job->N,
                    .type_y = job->type_y,
                    .s = from->s,
                    .qsum = from->qsum,
                    .w_scale = job->w_scale,
                    .y = job->y,
                    .bias = job->bias,
                    .residual = job->residual,
                    .has_bias = job->bias != NULL,
                    .has_residual = job->residual != NULL};
  int extras = job->bias || job->residual;
  /* In the order of GEMVS in kernels.py; what is added waits for the kernel before in any case. */
  int kernel = BC_GEMV1 + 3 * (ahead - 1) + (extras ? 2 : overlaps(gpu, job->early));
  int64_t shared = 4 * BC_GEMV_SUMS + (int64_t)warps * ahead * UNIT_COLUMNS;
  return launch(gpu, stream, kernel, ceil_div(job->N, TILE_ROWS), 1, warps * 32, shared,
                (void *[])BC_GEMV_ARGS(a), job->early);
}

static int decode(const bc_gpu *gpu, void *stream, const bc_linear *job, const Tokens *from,
                  int tokens) {
  int32_t tiles = (int32_t)ceil_div(job->N, TILE_ROWS), step = step_of(gpu, job);
  bc_decode_args a = {.q = from->q,
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
                      .tiles = tiles,
                      .step = step,
                      .pairs = pairs_of(job),
                      .type_y = job->type_y,
                      .has_bias = job->bias != NULL,
                      .has_residual = job->residual != NULL,
                      .activation = job->gate_out};
  return launch(gpu, stream, tokens == 8 ? BC_DECODE8 : BC_DECODE16, ceil_div(tiles, step), 1,
                BC_DECODE_WARPS * 32, decode_shared(gpu, job, tokens), (void *[])BC_DECODE_ARGS(a),
                job->early);
}

typedef struct Tile { /* of a product with many tokens */
  int kernel, tokens, threads, shared;
} Tile;
static const Tile mma = {BC_GEMM, GEMM_TOKENS, BC_GEMM_THREADS, 0};
static const Tile hopper[] = {BC_TILES};
enum { TILES = sizeof hopper / sizeof *hopper };

/* Times of a multiprocessor, measured on an H100, in quarters of a nanosecond: a unit of a tile's
 * columns, bound by the products or by what starts them, and what a tile costs besides. */
static int64_t unit_cost(int64_t tokens) {
  int64_t products = 9 * tokens, starts = 860 + 3 * tokens;
  return products > starts ? products : starts;
}
static int64_t tile_cost(int64_t tokens) { return 36 * tokens; }

/* The tile whose turns, each as many tiles as there are multiprocessors, end first. */
static const Tile *choose_tile(const bc_gpu *gpu, const bc_linear *job) {
  const Tile *best = NULL;
  int64_t least_cost = INT64_MAX;
  if (!gpu->kernel[hopper[0].kernel] || job->tile == BC_MMA_TILE) return &mma;
  if (job->tile > 0) return &hopper[job->tile - 1];
  for (int i = 0; i < TILES; i++) {
    int64_t tokens = hopper[i].tokens;
    int64_t tiles = ceil_div(job->N, BC_GEMM_ROWS) * ceil_div(job->M, tokens);
    int64_t cost =
        ceil_div(tiles, gpu->processors) * (units_of(job) * unit_cost(tokens) + tile_cost(tokens));
    if (cost >= least_cost) continue;
    best = &hopper[i];
    least_cost = cost;
  }
  return best;
}

static int64_t gemm_shared(void) {
  int64_t stages = (int64_t)BC_GEMM_STAGES * GEMM_TOKENS * UNIT_COLUMNS;
  int64_t finished = (int64_t)GEMM_TOKENS * (BC_GEMM_ROWS + BC_GEMM_PAD) * 4;
  return stages > finished ? stages : finished;
}

static int multiply(const bc_gpu *gpu, void *stream, const bc_linear *job, const Tokens *from) {
  const Tile *tile = choose_tile(gpu, job);
  int64_t blocks = ceil_div(job->N, BC_GEMM_ROWS), columns = ceil_div(job->M, tile->tokens);
  int plain = !job->residual || (job->type_y != FLOAT && aligned(job->residual));
  bc_gemm_args a = {
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
      .units = units_of(job),
      .token_groups = from->groups,
      .tiles = (int32_t)ceil_div(job->N, TILE_ROWS),
      .blocks = (int32_t)blocks,
      .type_y = job->type_y,
      .has_bias = job->bias != NULL,
      .has_residual = job->residual != NULL,
      .direct = plain && !job->bias && job->N % 8 == 0 && aligned(job->y) && job->K < 1 << 15};
  void **arguments = (void *[])BC_GEMM_ARGS(a);
  if (tile == &mma)
    return launch(gpu, stream, tile->kernel, blocks, columns, tile->threads, gemm_shared(),
                  arguments, job->early);
  return launch(gpu, stream, tile->kernel, least(blocks * columns, gpu->processors), 1,
                tile->threads, tile->shared, arguments, job->early);
}

/* Blocks of bc_grouped that take a multiprocessor as long as one tile of bc_grouped_many, or of
 * bc_grouped_wgmma (measured on an H100). */
enum { MANY_COST = 24, WGMMA_COST = 12 };

/* Units of columns that a warp takes in one turn, whole groups: all, if their sums fit in half of
 * the shared memory. */
static int32_t share_of(const bc_gpu *gpu, const bc_linear *job) {
  int64_t whole = ceil_div(job->group_size, UNIT_COLUMNS); /* units of a group, if it has any */
  int64_t bytes = BC_GROUPED_GROUP * whole * UNIT_COLUMNS / job->group_size * BC_GROUPED_WARPS;
  int64_t room = (gpu->shared_limit - 2048) / 2;
  return (int32_t)whole * least(ceil_div(units_of(job), whole * BC_GROUPED_WARPS), room / bytes);
}

static int multiply_groups(const bc_gpu *gpu, void *stream, const bc_linear *job,
                           const Tokens *from) {
  int64_t tiles = ceil_div(job->N, TILE_ROWS);
  bc_grouped_args a = {.q = from->q,
                       .s = from->s,
                       .w = job->w,
                       .w_scale = job->w_scale,
                       .bias = job->bias,
                       .residual = job->residual,
                       .y = job->y,
                       .M = job->M,
                       .N = job->N,
                       .units = units_of(job),
                       .token_groups = from->groups,
                       .tiles = (int32_t)tiles,
                       .groups = (int32_t)ceil_div(job->K, job->group_size),
                       .group_blocks = job->group_size / 16,
                       .share = share_of(gpu, job),
                       .type_y = job->type_y,
                       .has_bias = job->bias != NULL,
                       .has_residual = job->residual != NULL};
  int64_t blocks = ceil_div(job->N, BC_GEMM_ROWS), columns = ceil_div(job->M, GEMM_TOKENS);
  int wgmma = job->group_size >= 128  ? BC_GROUPED_WGMMA128
              : job->group_size == 64 ? BC_GROUPED_WGMMA64
                                      : BC_GROUPED_WGMMA32;
  int hopper = gpu->kernel[wgmma] && !job->split;
  int64_t turns = ceil_div(blocks * columns, gpu->processors);
  int64_t cost = turns * gpu->processors * (hopper ? WGMMA_COST : MANY_COST);
  int many = job->tile ? job->tile == BC_MMA_TILE : cost <= tiles * ceil_div(job->M, TOKENS);
  /* Few tokens are not padded to tiles of many. */
  many = many && job->M > 2 * TOKENS && a.group_blocks % BC_GROUPED_MANY_LEAST == 0;
  if (many && hopper)
    return launch(gpu, stream, wgmma, least(blocks * columns, gpu->processors), 1, BC_WGMMA_THREADS,
                  BC_GROUPED_WGMMA_SHARED, (void *[])BC_GROUPED_ARGS(a), job->early);
  if (many)
    return launch(gpu, stream, BC_GROUPED_MANY, blocks, columns, BC_GROUPED_MANY_THREADS,
                  gemm_shared(), (void *[])BC_GROUPED_ARGS(a), job->early);
  int64_t sums = (int64_t)a.share * UNIT_COLUMNS / job->group_size * BC_GROUPED_WARPS;
  return launch(gpu, stream, BC_GROUPED, tiles, ceil_div(job->M, TOKENS), BC_GROUPED_WARPS * 32,
                sums * BC_GROUPED_GROUP, (void *[])BC_GROUPED_ARGS(a), job->early);
}

int bc_cuda_linear(const bc_gpu *gpu, void *stream, const bc_linear *job, void *scratch) {
  int kind = decode_kind(gpu, job);
  if (kind == FUSED) return fused(gpu, stream, job);
  Tokens quantised = take_tokens(job, scratch);
  int result = job->quantised ? 0 : quantise(gpu, stream, job, &quantised);
  if (result) return result;
  if (job->group_size) return multiply_groups(gpu, stream, job, &quantised);
  if (kind == 1) return gemv(gpu, stream, job, &quantised);
  return kind ? decode(gpu, stream, job, &quantised, kind) : multiply(gpu, stream, job, &quantised);
}

static int64_t head_width(const bc_table *job) { return ceil_div(job->K, job->block) * job->block; }

int64_t bc_cuda_head_scratch(const bc_table *job) {
  return 2 * padded(job->M * head_width(job)) + padded((int64_t)job->M * 4);
}

int bc_cuda_head(const bc_gpu *gpu, void *stream, const bc_table *job, void *scratch) {
  int64_t width = head_width(job), bytes = padded(job->M * width);
  int wide = job->bits == 8;
  char *hi = scratch, *lo = hi + bytes, *s = lo + bytes;
  bc_head_quantize_args q = {.x = job->x,
                             .hi = hi,
                             .lo = lo,
                             .s = s,
                             .K = job->K,
                             .width = (int32_t)width,
                             .type = job->type_x};
  bc_head_args a = {.table = job->table,
                    .scale = job->scale,
                    .hi = hi,
                    .lo = lo,
                    .s = s,
                    .y = job->y,
                    .M = job->M,
                    .V = job->V,
                    .B = (int32_t)ceil_div(job->K, job->block),
                    .per_block = job->block * job->bits / 512};
  int result = launch(gpu, stream, wide ? BC_HEAD_QUANTIZE8 : BC_HEAD_QUANTIZE4, job->M, 1,
                      BC_HEAD_THREADS, 0, (void *[])BC_HEAD_QUANTIZE_ARGS(q), job->early);
  if (result) return result;
  static const int kernels[2][3] = {{BC_HEAD4_1, BC_HEAD4_4, BC_HEAD4_8},
                                    {BC_HEAD8_1, BC_HEAD8_4, BC_HEAD8_8}};
  static const int tokens[3] = {1, 4, 8};
  int way = job->M <= 2 ? 0 : job->M <= 4 ? 1 : 2; /* as was fastest on an H100 */
  return launch(gpu, stream, kernels[wide][way], ceil_div(job->V, BC_HEAD_ROWS),
                ceil_div(job->M, tokens[way]), BC_HEAD_THREADS, 0, (void *[])BC_HEAD_ARGS(a),
                job->early);
}

int bc_cuda_read(const bc_gpu *gpu, void *stream, const void *data, int64_t bytes, void *out) {
  bc_read_args a = {.data = data, .out = out, .loads = (int32_t)(bytes / 16)};
  int64_t blocks = ceil_div(a.loads, BC_READ_THREADS * BC_READ_LOADS);
  return launch(gpu, stream, BC_READ, blocks, 1, BC_READ_THREADS, 0, (void *[])BC_READ_ARGS(a), 0);
}
