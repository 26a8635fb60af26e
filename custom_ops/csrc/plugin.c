/* The ONNX Runtime custom-op plugin: checks, scratch memory and threads around the kernels.
 *
 * Every check is made in Compute, because ONNX Runtime swallows errors of shape inference. Compute
 * is re-entrant: a kernel object is read-only after its creation. Weights are read where the runtime
 * mapped them. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "ort_abi.h"

enum {
  MAX_INPUTS = 8,
  MAX_RANK = 8,
  TILE_ROWS = 16,     /* weight rows and columns of a tile of the CPU layout */
  TILE_BYTES = 64,
  DECODE_ROWS = 8,    /* up to here a gemv, above a gemm */
  MAX_K = 1 << 18,    /* int32 sums of field values stay below 2**31 */
  MAX_N = 1 << 23,    /* and so do the kernels' int32 offsets, over the rows of a task */
  MAX_BLOCK = 8192,   /* int32 sums of a head block: 512 codes a lane * 255 * 16256 */
  ALIGN = 64,
};

#define TRY(expression)                 \
  do {                                  \
    BcStatus *status_ = (expression);   \
    if (status_) return status_;        \
  } while (0)

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static BcStatus *fail(const BcApi *api, int code, const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return ort_CreateStatus(api)(code, text);
}

/* ---- operators as data ---------------------------------------------------------------------- */

typedef struct Kernel Kernel;

typedef struct Spec {
  const char *name;
  size_t inputs;
  uint32_t bytes_inputs; /* bit i set: input i is uint8 */
  int has_norm;          /* takes attribute eps */
  BcStatus *(*compute)(const Kernel *, BcContext *);
} Spec;

typedef struct Operator { /* one per registration: its API table and kernel variant */
  BcOp base;              /* first: the runtime hands back a pointer to it */
  const BcApi *api;
  const bc_variant *variant;
  const Spec *spec;
} Operator;

typedef struct Tensor {
  const void *data;
  size_t rank;
  int64_t dim[MAX_RANK];
} Tensor;

struct Kernel {
  const BcApi *api;
  const bc_variant *variant;
  const Spec *spec;
  int64_t K, N, F, F2, act_bits, bits, block, sub_norm, activation, kind, steps;
  int64_t group_size; /* columns that share a scale, 0 for a whole row */
  float eps;
  uint32_t constant;          /* bit i set: input i is a constant, parsed once */
  Tensor fixed[MAX_INPUTS];
};

static int64_t elements(const Tensor *t) {
  int64_t n = 1;
  for (size_t i = 0; i < t->rank; i++) n *= t->dim[i];
  return n;
}

static BcStatus *parse_tensor(const Kernel *k, size_t index, const BcValue *value, Tensor *out) {
  const BcApi *api = k->api;
  BcShape *shape = NULL;
  void *data = NULL;
  if (!value)
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: input %zu is missing; absent inputs are "
                "rank-0 zeros", k->spec->name, index);
  TRY(ort_GetTensorTypeAndShape(api)(value, &shape));
  BcStatus *status = ort_GetDimensionsCount(api)(shape, &out->rank);
  if (!status && out->rank > MAX_RANK)
    status = fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: input %zu has rank %zu; at most %d is "
                  "supported", k->spec->name, index, out->rank, MAX_RANK);
  if (!status) status = ort_GetDimensions(api)(shape, out->dim, out->rank);
  ort_ReleaseTensorTypeAndShapeInfo(api)(shape);
  if (status) return status;
  TRY(ort_GetTensorMutableData(api)((BcValue *)value, &data));
  out->data = data;
  return NULL;
}

static BcStatus *read_inputs(const Kernel *k, BcContext *context, Tensor *in) {
  for (size_t i = 0; i < k->spec->inputs; i++) {
    const BcValue *value = NULL;
    if (k->constant >> i & 1) {
      in[i] = k->fixed[i];
      continue;
    }
    TRY(ort_KernelContext_GetInput(k->api)(context, i, &value));
    TRY(parse_tensor(k, i, value, &in[i]));
  }
  return NULL;
}

static BcStatus *expect(const Kernel *k, const char *what, const Tensor *t, size_t rank,
                        const int64_t *dim) {
  int good = t->rank == rank;
  for (size_t i = 0; good && i < rank; i++) good = t->dim[i] == dim[i];
  if (good) return NULL;
  char want[160], got[160];
  size_t w = 0, g = 0;
  want[0] = got[0] = 0;
  for (size_t i = 0; i < rank && w < sizeof want; i++)
    w += (size_t)snprintf(want + w, sizeof want - w, "%s%lld", i ? ", " : "", (long long)dim[i]);
  for (size_t i = 0; i < t->rank && g < sizeof got; i++)
    g += (size_t)snprintf(got + g, sizeof got - g, "%s%lld", i ? ", " : "", (long long)t->dim[i]);
  return fail(k->api, BC_INVALID_ARGUMENT, "bitcompile::%s: %s has shape [%s], expected [%s]; build "
              "the model again or fix its input", k->spec->name, what, got, want);
}

/* Scales along K columns. */
static int64_t groups(const Kernel *k, int64_t K) {
  return k->group_size ? ceil_div(K, k->group_size) : 1;
}

static BcStatus *expect_weight(const Kernel *k, const char *what, const Tensor *w,
                               const char *scale_name, const Tensor *scale, int64_t N, int64_t K) {
  const int64_t packed[] = {ceil_div(N, TILE_ROWS), ceil_div(K, TILE_ROWS), TILE_BYTES};
  const int64_t scales[] = {N, 1}, grouped[] = {packed[0], groups(k, K), TILE_ROWS};
  TRY(expect(k, what, w, 3, packed));
  if (k->group_size) return expect(k, scale_name, scale, 3, grouped);
  return expect(k, scale_name, scale, 2, scales);
}

/* An optional float input: NULL if it is the rank-0 zero that means "absent". */
static BcStatus *optional(const Kernel *k, const char *what, const Tensor *t, size_t rank,
                          const int64_t *dim, const float **out) {
  *out = NULL;
  if (t->rank == 0) {
    if (*(const float *)t->data == 0.0f) return NULL;
    return fail(k->api, BC_INVALID_ARGUMENT, "bitcompile::%s: %s is a scalar other than 0; give its "
                "full shape, or a scalar 0 for none", k->spec->name, what);
  }
  TRY(expect(k, what, t, rank, dim));
  *out = t->data;
  return NULL;
}

/* x [..., K]: checks its last dimension, allocates y [..., N], counts rows. */
static BcStatus *open_rows(const Kernel *k, BcContext *context, const Tensor *x, int64_t K, int64_t N,
                           Tensor *y, int64_t *M) {
  BcValue *value = NULL;
  void *data = NULL;
  if (x->rank < 1 || x->dim[x->rank - 1] != K)
    return fail(k->api, BC_INVALID_ARGUMENT, "bitcompile::%s: the last dimension of x is %lld; the "
                "weights have K = %lld columns", k->spec->name,
                (long long)(x->rank ? x->dim[x->rank - 1] : 0), (long long)K);
  *y = *x;
  y->dim[y->rank - 1] = N;
  *M = elements(x) / K;
  TRY(ort_KernelContext_GetOutput(k->api)(context, 0, y->dim, y->rank, &value));
  TRY(ort_GetTensorMutableData(k->api)(value, &data));
  y->data = data;
  if (*M > INT32_MAX / 16)
    return fail(k->api, BC_INVALID_ARGUMENT, "bitcompile::%s: %lld rows in one call; at most %d are "
                "supported: split the batch", k->spec->name, (long long)*M, INT32_MAX / 16);
  return NULL;
}

/* ---- scratch memory -------------------------------------------------------------------------- */

typedef struct Scratch { /* one allocation, handed out piece by piece */
  BcAllocator *allocator;
  void *block;
  char *next;
} Scratch;

static int64_t padded(int64_t bytes) { return ceil_div(bytes, ALIGN) * ALIGN; }

static BcStatus *open_scratch(const Kernel *k, BcContext *context, int64_t bytes, Scratch *out) {
  BcMemoryInfo *memory = NULL;
  memset(out, 0, sizeof *out);
  TRY(ort_CreateCpuMemoryInfo(k->api)(BC_ARENA, BC_MEM_DEFAULT, &memory));
  BcStatus *status = ort_KernelContext_GetAllocator(k->api)(context, memory, &out->allocator);
  ort_ReleaseMemoryInfo(k->api)(memory);
  if (status) return status;
  out->block = out->allocator->Alloc(out->allocator, (size_t)(bytes + ALIGN));
  if (!out->block) {
    ort_ReleaseAllocator(k->api)(out->allocator);
    return fail(k->api, BC_FAIL, "bitcompile::%s: out of memory for %lld bytes of scratch; use "
                "shorter sequences", k->spec->name, (long long)bytes);
  }
  out->next = (char *)(((uintptr_t)out->block + ALIGN - 1) / ALIGN * ALIGN);
  return NULL;
}

static void *take(Scratch *scratch, int64_t bytes) {
  void *piece = scratch->next;
  scratch->next += padded(bytes);
  return piece;
}

static void close_scratch(const Kernel *k, Scratch *scratch) {
  scratch->allocator->Free(scratch->allocator, scratch->block);
  ort_ReleaseAllocator(k->api)(scratch->allocator);
}

/* ---- work on the runtime's threads ----------------------------------------------------------- */

/* Runs task(job, i) for i < count: here if there is one, else on the intra-op pool. */
static BcStatus *parallel(const Kernel *k, BcContext *context, void (*task)(void *, size_t),
                          int64_t count, void *job) {
  if (count == 1) {
    task(job, 0);
    return NULL;
  }
  return ort_KernelContext_ParallelFor(k->api)(context, task, (size_t)count, 0, job);
}

/* Quantised activation rows: where a row kernel leaves them and a matrix product reads them. */
typedef struct Rows {
  int8_t *q; /* [M + BC_ROW_PAD, Kp] */
  float *s;
  int32_t *qsum; /* [M + BC_ROW_PAD], or [M + BC_ROW_PAD, G] for group-scaled weights */
  int64_t Kp, G, group_blocks; /* group_blocks: 16-column blocks of a group, 0 for whole rows */
} Rows;

static int64_t rows_bytes(const Kernel *k, int64_t M, int64_t K) {
  int64_t Kp = ceil_div(K, TILE_ROWS) * TILE_ROWS, padded_rows = M + BC_ROW_PAD;
  int64_t sums = padded_rows * groups(k, K) * 4;
  return padded(padded_rows * Kp) + padded(padded_rows * 4) + padded(sums);
}

static Rows take_rows(const Kernel *k, Scratch *scratch, int64_t M, int64_t K) {
  Rows rows = {.Kp = ceil_div(K, TILE_ROWS) * TILE_ROWS, .G = groups(k, K)};
  rows.group_blocks = k->group_size / TILE_ROWS;
  rows.q = take(scratch, (M + BC_ROW_PAD) * rows.Kp);
  rows.s = take(scratch, (M + BC_ROW_PAD) * 4);
  rows.qsum = take(scratch, (M + BC_ROW_PAD) * rows.G * 4);
  /* A gemm multiplies the rows that fill its register tile and drops the results. */
  memset(rows.q + M * rows.Kp, 0, (size_t)(BC_ROW_PAD * rows.Kp));
  memset(rows.s + M, 0, BC_ROW_PAD * 4);
  memset(rows.qsum + M * rows.G, 0, (size_t)(BC_ROW_PAD * rows.G * 4));
  return rows;
}

typedef struct RowJob { /* glu (if both), norm (if gamma) and quantisation of M rows */
  const bc_variant *v;
  const float *both, *x, *gamma;
  float *hidden;
  bc_glu_fn *glu;
  Rows to;
  int64_t M, K, step;
  float eps;
} RowJob;

static void row_task(void *opaque, size_t i) {
  RowJob *j = opaque;
  int64_t m = (int64_t)i * j->step;
  int32_t count = (int32_t)min64(j->step, j->M - m), K = (int32_t)j->K, Kp = (int32_t)j->to.Kp;
  const float *x = j->x + m * j->K;
  int8_t *q = j->to.q + m * j->to.Kp;
  /* With groups the row sums of the quantisation are replaced by those of the groups; G >= 1 leaves
   * room for both. */
  int32_t *qsum = j->to.qsum + m * j->to.G;
  if (j->glu) j->glu(j->both + 2 * m * j->K, j->hidden + m * j->K, count, K);
  if (j->gamma)
    j->v->norm_quantize(x, j->gamma, q, j->to.s + m, qsum, count, K, Kp, j->eps);
  else
    j->v->quantize(x, q, j->to.s + m, qsum, count, K, Kp);
  if (j->to.group_blocks)
    j->v->group_sums(q, qsum, count, Kp, (int32_t)j->to.G, (int32_t)j->to.group_blocks);
}

static BcStatus *run_rows(const Kernel *k, BcContext *context, RowJob *job) {
  job->v = k->variant;
  job->step = ceil_div(1 << 14, job->K); /* ~16k values a task: microseconds */
  return parallel(k, context, row_task, ceil_div(job->M, job->step), job);
}

typedef struct MatmulJob {
  const bc_variant *v;
  const uint8_t *w;
  const float *w_scale, *bias, *residual;
  Rows from;
  float *y;
  int64_t M, N, KB, ldy;
  int64_t step;   /* tiles of a task */
  int64_t m_step; /* activation rows of a task */
  int64_t columns; /* tasks along N */
} MatmulJob;

static const float *at(const float *p, int64_t offset) { return p ? p + offset : NULL; }

/* The arguments every product kernel begins with, for weight rows from n and activation rows from m
 * on. */
#define PRODUCT(j, tile, n, m, tiles, M)                                                             \
  (j)->w + (tile) * (j)->KB * TILE_BYTES, (const int32_t *)((j)->from.q + (m) * (j)->from.Kp),       \
      (j)->from.qsum + (m) * (j)->from.G, (j)->from.s + (m), (j)->w_scale + (n) * (j)->from.G,       \
      at((j)->bias, n), at((j)->residual, (m) * (j)->ldy + (n)), (j)->y + (m) * (j)->ldy + (n),      \
      (int32_t)((j)->N - (n)), (int32_t)(j)->ldy, (j)->bias != NULL, (j)->residual != NULL,          \
      (int32_t)(tiles), (int32_t)(M), (int32_t)(j)->KB
#define GROUPS(j) (int32_t)(j)->from.G, (int32_t)(j)->from.group_blocks

static void gemv_task(void *opaque, size_t i) {
  MatmulJob *j = opaque;
  int64_t tile = (int64_t)i * j->step, n = tile * TILE_ROWS;
  int64_t tiles = min64(j->step, ceil_div(j->N, TILE_ROWS) - tile);
  if (j->from.group_blocks)
    j->v->gemv_grouped(PRODUCT(j, tile, n, 0, tiles, j->M), GROUPS(j));
  else
    j->v->gemv(PRODUCT(j, tile, n, 0, tiles, j->M));
}

static void gemm_task(void *opaque, size_t i) {
  _Alignas(ALIGN) uint8_t panel[BC_MAX_PANEL];
  _Alignas(ALIGN) int32_t partial[BC_MAX_PARTIAL];
  MatmulJob *j = opaque;
  int64_t tile = ((int64_t)i % j->columns) * j->step, n = tile * TILE_ROWS;
  int64_t m = ((int64_t)i / j->columns) * j->m_step;
  int64_t tiles = min64(j->step, ceil_div(j->N, TILE_ROWS) - tile);
  int64_t M = min64(j->m_step, j->M - m);
  if (j->from.group_blocks)
    j->v->gemm_grouped(PRODUCT(j, tile, n, m, tiles, M), GROUPS(j), panel, (float *)partial);
  else
    j->v->gemm(PRODUCT(j, tile, n, m, tiles, M), panel, partial);
}

static BcStatus *run_matmul(const Kernel *k, BcContext *context, MatmulJob *job) {
  int64_t tiles = ceil_div(job->N, TILE_ROWS);
  job->v = k->variant;
  job->KB = job->from.Kp / TILE_ROWS;
  job->ldy = job->N;
  if (job->M <= DECODE_ROWS) {
    /* An even number of tiles, for kernels that walk two, and some 128 KiB of weights a task. */
    job->step = ceil_div(1 << 17, 2 * job->KB * TILE_BYTES) * 2;
    return parallel(k, context, gemv_task, ceil_div(tiles, job->step), job);
  }
  job->step = job->v->gemm_tiles;
  job->m_step = (int64_t)job->v->gemm_rows * BC_GEMM_BLOCKS;
  job->columns = ceil_div(tiles, job->step);
  return parallel(k, context, gemm_task, job->columns * ceil_div(job->M, job->m_step), job);
}

/* ---- the operators --------------------------------------------------------------------------- */

/* BitLinear(x, w, w_scale, bias, residual), NormBitLinear(x, gamma, w, w_scale, bias, residual) */
static BcStatus *compute_linear(const Kernel *k, BcContext *context, const Tensor *gamma,
                                const Tensor *x, const Tensor *rest) {
  const Tensor *w = &rest[0], *w_scale = &rest[1];
  Tensor y;
  Scratch scratch;
  int64_t M, gamma_shape[] = {k->K}, bias_shape[] = {k->N};
  MatmulJob matmul = {.w = w->data, .w_scale = w_scale->data, .N = k->N};
  TRY(expect_weight(k, "w", w, "w_scale", w_scale, k->N, k->K));
  if (gamma) TRY(expect(k, "gamma", gamma, 1, gamma_shape));
  TRY(open_rows(k, context, x, k->K, k->N, &y, &M));
  TRY(optional(k, "bias", &rest[2], 1, bias_shape, &matmul.bias));
  TRY(optional(k, "residual", &rest[3], y.rank, y.dim, &matmul.residual));
  if (M == 0) return NULL;
  TRY(open_scratch(k, context, rows_bytes(k, M, k->K), &scratch));
  RowJob rows = {.x = x->data, .gamma = gamma ? gamma->data : NULL, .M = M, .K = k->K, .eps = k->eps};
  rows.to = matmul.from = take_rows(k, &scratch, M, k->K);
  matmul.M = M;
  matmul.y = (float *)y.data;
  BcStatus *status = run_rows(k, context, &rows);
  if (!status) status = run_matmul(k, context, &matmul);
  close_scratch(k, &scratch);
  return status;
}

static BcStatus *compute_bit_linear(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS];
  TRY(read_inputs(k, context, in));
  return compute_linear(k, context, NULL, &in[0], &in[1]);
}

static BcStatus *compute_norm_bit_linear(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS];
  TRY(read_inputs(k, context, in));
  return compute_linear(k, context, &in[1], &in[0], &in[2]);
}

enum { PASS_ROWS = 1024 }; /* rows of one pass, which bounds the scratch memory */

static BcStatus *compute_bit_glu(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS], y;
  Scratch scratch;
  int64_t M, in_shape[] = {k->K}, sub_shape[] = {k->F};
  const float *residual;
  TRY(read_inputs(k, context, in));
  TRY(expect(k, "gamma_in", &in[1], 1, in_shape));
  TRY(expect_weight(k, "w_gate_up", &in[2], "s_gate_up", &in[3], 2 * k->F, k->K));
  if (k->sub_norm) TRY(expect(k, "gamma_sub", &in[4], 1, sub_shape));
  TRY(expect_weight(k, "w_down", &in[5], "s_down", &in[6], k->N, k->F));
  TRY(open_rows(k, context, &in[0], k->K, k->N, &y, &M));
  TRY(optional(k, "residual", &in[7], y.rank, y.dim, &residual));
  if (M == 0) return NULL;

  int64_t most = min64(M, PASS_ROWS);
  int64_t bytes = rows_bytes(k, most, k->K) + rows_bytes(k, most, k->F);
  bytes += padded(3 * most * k->F * 4);
  TRY(open_scratch(k, context, bytes, &scratch));
  Rows outer = take_rows(k, &scratch, most, k->K), inner = take_rows(k, &scratch, most, k->F);
  float *both = take(&scratch, 2 * most * k->F * 4), *hidden = both + 2 * most * k->F;
  BcStatus *status = NULL;
  for (int64_t m = 0; m < M && !status; m += most) {
    int64_t count = min64(most, M - m);
    RowJob norm = {.x = (const float *)in[0].data + m * k->K, .gamma = in[1].data, .to = outer,
                   .M = count, .K = k->K, .eps = k->eps};
    MatmulJob gate_up = {.w = in[2].data, .w_scale = in[3].data, .from = outer, .y = both,
                         .M = count, .N = 2 * k->F};
    RowJob gate = {.both = both, .glu = k->variant->glu[k->activation], .hidden = hidden,
                   .x = hidden, .gamma = k->sub_norm ? in[4].data : NULL, .to = inner,
                   .M = count, .K = k->F, .eps = k->eps};
    MatmulJob down = {.w = in[5].data, .w_scale = in[6].data, .from = inner,
                      .residual = at(residual, m * k->N), .y = (float *)y.data + m * k->N,
                      .M = count, .N = k->N};
    status = run_rows(k, context, &norm);
    if (!status) status = run_matmul(k, context, &gate_up);
    if (!status) status = run_rows(k, context, &gate);
    if (!status) status = run_matmul(k, context, &down);
  }
  close_scratch(k, &scratch);
  return status;
}

typedef struct HeadJob {
  const bc_variant *v;
  bc_head_quantize_fn *quantize;
  bc_head_fn *head;
  const float *x, *scale;
  const uint8_t *table;
  int8_t *hi, *lo;
  int32_t *offset;
  float *s, *y;
  int64_t M, K, V, B, per_block, row_bytes, width, step;
} HeadJob;

static void head_quantize_task(void *opaque, size_t i) {
  HeadJob *j = opaque;
  int64_t m = (int64_t)i;
  j->quantize(j->x + m * j->K, j->hi + m * j->width, j->lo + m * j->width, j->offset + m * j->B * 16,
              j->s + m, 1, (int32_t)j->K, (int32_t)j->B, (int32_t)j->per_block);
}

static void head_task(void *opaque, size_t i) {
  HeadJob *j = opaque;
  int64_t v = (int64_t)i * j->step;
  j->head(j->table + v * j->row_bytes, j->scale + v * j->B, j->hi, j->lo, j->offset, j->s, j->y + v,
          (int32_t)min64(j->step, j->V - v), (int32_t)j->M, (int32_t)j->B, (int32_t)j->per_block,
          (int32_t)j->V);
}

static BcStatus *compute_head_linear(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS], y;
  Scratch scratch;
  int64_t M, B = ceil_div(k->K, k->block), block_bytes = k->block * k->bits / 8;
  const int64_t table_shape[] = {k->N, B, block_bytes}, scale_shape[] = {k->N, B, 1};
  TRY(read_inputs(k, context, in));
  TRY(expect(k, "table", &in[1], 3, table_shape));
  TRY(expect(k, "scale", &in[2], 3, scale_shape));
  TRY(open_rows(k, context, &in[0], k->K, k->N, &y, &M));
  if (M == 0) return NULL;
  HeadJob job = {.v = k->variant, .table = in[1].data, .scale = in[2].data, .K = k->K, .V = k->N, .B = B,
                 .per_block = block_bytes / 64, .row_bytes = B * block_bytes, .width = B * k->block};
  job.quantize = k->bits == 8 ? k->variant->head_quantize8 : k->variant->head_quantize4;
  job.head = k->bits == 8 ? k->variant->head8 : k->variant->head4;
  job.step = ceil_div(1 << 16, job.row_bytes);
  int64_t widest = job.width > k->N ? job.width : k->N;
  int64_t most = min64(min64(M, PASS_ROWS), INT32_MAX / widest); /* the kernels' offsets are int32 */
  int64_t bytes = 2 * padded(most * job.width) + padded(most * B * 64) + padded(most * 4);
  TRY(open_scratch(k, context, bytes, &scratch));
  job.hi = take(&scratch, most * job.width);
  job.lo = take(&scratch, most * job.width);
  job.offset = take(&scratch, most * B * 64);
  job.s = take(&scratch, most * 4);
  BcStatus *status = NULL;
  for (int64_t m = 0; m < M && !status; m += most) {
    job.M = min64(most, M - m);
    job.x = (const float *)in[0].data + m * k->K;
    job.y = (float *)y.data + m * k->N;
    status = parallel(k, context, head_quantize_task, job.M, &job);
    if (!status) status = parallel(k, context, head_task, ceil_div(k->N, job.step), &job);
  }
  close_scratch(k, &scratch);
  return status;
}

/* Roof(data) -> bytes [tasks, 64]: what `bitcompile bench` compares with. kind 0 reads all of data
 * once; kind 1 runs `steps` rounds of dot products a task; kind 2 tells the variant, the
 * multiply-accumulates of a round and the tasks of kind 1. Not part of the model operators. */
typedef struct RoofJob {
  const bc_variant *v;
  const uint8_t *data;
  uint8_t *out;
  int64_t bytes, step, kind, steps;
} RoofJob;

enum { ROOF_TASK = 1 << 20, ROOF_STEP = 256, DOT_TASKS = 64 };
enum { ROOF_READ, ROOF_DOT, ROOF_ABOUT };

static void roof_task(void *opaque, size_t i) {
  RoofJob *j = opaque;
  uint8_t *out = j->out + i * 64;
  if (j->kind == ROOF_DOT) {
    j->v->dot_roof(j->data, (int32_t *)out, (int32_t)j->steps);
    return;
  }
  int64_t first = (int64_t)i * ROOF_TASK;
  j->v->read_roof(j->data + first, out, (int32_t)(min64(ROOF_TASK, j->bytes - first) / ROOF_STEP));
}

static BcStatus *compute_roof(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS];
  BcValue *value = NULL;
  void *data = NULL;
  TRY(read_inputs(k, context, in));
  RoofJob job = {.v = k->variant, .data = in[0].data, .bytes = elements(&in[0]), .kind = k->kind,
                 .steps = k->steps};
  if (job.bytes < ROOF_STEP)
    return fail(k->api, BC_INVALID_ARGUMENT, "bitcompile::Roof: data must hold at least %d bytes",
                ROOF_STEP);
  int64_t tasks = k->kind == ROOF_READ ? ceil_div(job.bytes, ROOF_TASK) : DOT_TASKS;
  int64_t dim[] = {k->kind == ROOF_ABOUT ? 1 : tasks, 64};
  TRY(ort_KernelContext_GetOutput(k->api)(context, 0, dim, 2, &value));
  TRY(ort_GetTensorMutableData(k->api)(value, &data));
  job.out = data;
  memset(data, 0, (size_t)(dim[0] * 64));
  if (k->kind == ROOF_ABOUT) {
    snprintf(data, 64, "%s %lld %d", k->variant->isa, (long long)k->variant->dot_roof_macs, DOT_TASKS);
    return NULL;
  }
  return parallel(k, context, roof_task, tasks, &job);
}

static const Spec specs[] = {
    {"BitLinear", 5, 1u << 1, 0, compute_bit_linear},
    {"NormBitLinear", 6, 1u << 2, 1, compute_norm_bit_linear},
    {"BitGLU", 8, 1u << 2 | 1u << 5, 1, compute_bit_glu},
    {"HeadLinear", 3, 1u << 1, 0, compute_head_linear},
    {"Roof", 1, 1u << 0, 0, compute_roof},
};
enum { SPECS = sizeof specs / sizeof *specs };

/* ---- kernel creation ------------------------------------------------------------------------- */

/* An int attribute; `otherwise` where the node has none, INT64_MIN (which no check accepts) where it
 * has a float of that name. */
static int64_t attribute(const BcApi *api, const BcInfo *info, const char *name, int64_t otherwise) {
  int64_t value = otherwise;
  float wrong;
  BcStatus *status = ort_KernelInfoGetAttribute_int64(api)(info, name, &value);
  if (!status) return value;
  ort_ReleaseStatus(api)(status);
  status = ort_KernelInfoGetAttribute_float(api)(info, name, &wrong);
  if (!status) return INT64_MIN;
  ort_ReleaseStatus(api)(status);
  return otherwise;
}

static void attribute_text(const BcApi *api, const BcInfo *info, const char *name, char *out,
                           size_t size) {
  BcStatus *status = ort_KernelInfoGetAttribute_string(api)(info, name, out, &size);
  if (!status) return;
  ort_ReleaseStatus(api)(status);
  out[0] = 0;
}

static BcStatus *check_attributes(const Kernel *k, const BcInfo *info) {
  static const char *activations[BC_ACTIVATIONS] = {"relu2", "silu", "gelu_tanh", "gelu_erf"};
  const BcApi *api = k->api;
  const char *name = k->spec->name;
  char text[64];
  if (k->spec->compute == compute_roof) return NULL;
  if (k->K < 1 || k->N < 1 || k->K > MAX_K || k->N > MAX_N)
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: K = %lld, N = %lld; K must be 1..%d and N "
                "1..%d", name, (long long)k->K, (long long)k->N, MAX_K, MAX_N);
  if (k->spec->compute == compute_head_linear) {
    if ((k->bits == 8 || k->bits == 4) && k->block > 0 && k->block <= MAX_BLOCK &&
        k->block * k->bits % (8 * 64) == 0)
      return NULL;
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: bits = %lld, block = %lld; bits must be 8 "
                "or 4 and a block whole 64-byte chunks, at most %d weights", name,
                (long long)k->bits, (long long)k->block, MAX_BLOCK);
  }
  if (k->spec->has_norm && !(k->eps >= 0 && k->eps < 1))
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: eps = %g; it is a float attribute from 0 to "
                "1, and required", name, (double)k->eps);
  attribute_text(api, info, "layout", text, sizeof text);
  if (strcmp(text, bc_layout))
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: weights have layout '%s'; this plugin "
                "reads '%s': build the artifact for this target", name, text, bc_layout);
  if (k->act_bits != 8)
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: this plugin computes act_bits = 8 only: "
                "build the artifact with a bitcompile that has others", name);
  int64_t g = k->group_size; /* 0, or a power of two from 16 to 256: a panel holds whole groups */
  if (g && (g < TILE_ROWS || g > 256 || (g & (g - 1))))
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: group_size = %lld; it must be 0, 16, 32, "
                "64, 128 or 256", name, (long long)g);
  if (k->spec->compute != compute_bit_glu) return NULL;
  if (k->F < 1 || k->F > MAX_K || k->F2 != 2 * k->F)
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: F = %lld, F2 = %lld; F must be 1..%d and F2 "
                "twice as much", name, (long long)k->F, (long long)k->F2, MAX_K);
  if (k->sub_norm != 0 && k->sub_norm != 1)
    return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: sub_norm is an int attribute, 0 or 1, and "
                "required", name);
  attribute_text(api, info, "activation", text, sizeof text);
  for (int i = 0; i < BC_ACTIVATIONS; i++)
    if (!strcmp(text, activations[i])) {
      ((Kernel *)k)->activation = i;
      return NULL;
    }
  return fail(api, BC_INVALID_ARGUMENT, "bitcompile::%s: activation '%s' is unknown; known: relu2, "
              "silu, gelu_tanh, gelu_erf", name, text);
}

static BcStatus *BC_CALL create(const BcOp *base, const BcApi *api, const BcInfo *info, void **out) {
  const Operator *op = (const Operator *)base;
  Kernel *k = calloc(1, sizeof *k);
  *out = NULL;
  if (!k) return fail(api, BC_FAIL, "bitcompile::%s: out of memory", op->spec->name);
  k->api = api;
  k->variant = op->variant;
  k->spec = op->spec;
  /* An absent attribute gets the schema's default, or a value that check_attributes refuses. */
  k->K = attribute(api, info, "K", 0);
  k->N = attribute(api, info, "N", 0);
  k->F = attribute(api, info, "F", 0);
  k->F2 = attribute(api, info, "F2", 0);
  k->group_size = attribute(api, info, "group_size", 0);
  k->act_bits = attribute(api, info, "act_bits", 8);
  k->bits = attribute(api, info, "bits", 0);
  k->block = attribute(api, info, "block", 128);
  k->sub_norm = attribute(api, info, "sub_norm", -1);
  k->kind = attribute(api, info, "kind", 0);
  k->steps = attribute(api, info, "steps", 1);
  k->eps = -1;
  BcStatus *status = ort_KernelInfoGetAttribute_float(api)(info, "eps", &k->eps);
  if (status) ort_ReleaseStatus(api)(status);
  status = check_attributes(k, info);
  for (size_t i = 0; i < k->spec->inputs && !status; i++) {
    int constant = 0;
    const BcValue *value = NULL;
    status = ort_KernelInfoGetConstantInput_tensor(api)(info, i, &constant, &value);
    if (status || !constant || !value) continue;
    status = parse_tensor(k, i, value, &k->fixed[i]);
    k->constant |= 1u << i;
  }
  if (status)
    free(k);
  else
    *out = k;
  return status;
}

static BcStatus *BC_CALL compute(void *kernel, BcContext *context) {
  const Kernel *k = kernel;
  return k->spec->compute(k, context);
}

static void BC_CALL destroy(void *kernel) { free(kernel); }

/* The output has the shape of x with N as last dimension; unknown shapes stay unknown. */
static BcStatus *infer_shape(const Operator *op, BcInfer *context) {
  const BcApi *api = op->api;
  BcShape *x = NULL, *y = NULL;
  size_t rank = 0;
  int64_t dim[MAX_RANK], N = 0;
  const char *symbol[MAX_RANK] = {0};
  const BcOpAttr *attr = NULL;
  size_t size = 0;
  TRY(ort_ShapeInferContext_GetInputTypeShape(api)(context, 0, &x));
  TRY(ort_GetDimensionsCount(api)(x, &rank));
  if (rank < 1 || rank > MAX_RANK) return NULL;
  TRY(ort_GetDimensions(api)(x, dim, rank));
  TRY(ort_GetSymbolicDimensions(api)(x, symbol, rank));
  TRY(ort_ShapeInferContext_GetAttribute(api)(context, "N", &attr));
  TRY(ort_ReadOpAttr(api)(attr, BC_ATTR_INT, &N, sizeof N, &size));
  dim[rank - 1] = N;
  symbol[rank - 1] = "";
  for (size_t i = 0; i < rank; i++)
    if (!symbol[i]) symbol[i] = "";
  TRY(ort_CreateTensorTypeAndShapeInfo(api)(&y));
  BcStatus *status = ort_SetTensorElementType(api)(y, BC_FLOAT);
  if (!status) status = ort_SetDimensions(api)(y, dim, rank);
  if (!status) status = ort_SetSymbolicDimensions(api)(y, symbol, rank);
  if (!status) status = ort_ShapeInferContext_SetOutputTypeShape(api)(context, 0, y);
  ort_ReleaseTensorTypeAndShapeInfo(api)(y);
  return status;
}

static BcStatus *BC_CALL infer(const BcOp *base, BcInfer *context) {
  const Operator *op = (const Operator *)base;
  return op->spec->compute == compute_roof ? NULL : infer_shape(op, context);
}

/* ---- what ONNX Runtime asks of an operator ---------------------------------------------------- */

static const char *BC_CALL get_name(const BcOp *op) { return ((const Operator *)op)->spec->name; }
static const char *BC_CALL get_provider(const BcOp *op) { return (void)op, NULL; /* CPU */ }
static size_t BC_CALL input_count(const BcOp *op) { return ((const Operator *)op)->spec->inputs; }
static int BC_CALL input_type(const BcOp *op, size_t i) {
  return ((const Operator *)op)->spec->bytes_inputs >> i & 1 ? BC_UINT8 : BC_FLOAT;
}
static int BC_CALL output_type(const BcOp *op, size_t i) {
  (void)i;
  return ((const Operator *)op)->spec->compute == compute_roof ? BC_UINT8 : BC_FLOAT;
}
static size_t BC_CALL output_count(const BcOp *op) { return (void)op, 1; }
static int BC_CALL zero_of(const BcOp *op, size_t i) { return (void)op, (void)i, 0; }
static int BC_CALL one(const BcOp *op) { return (void)op, 1; }
static int BC_CALL any_version(const BcOp *op) { return (void)op, INT32_MAX; }
/* The interfaces before API 16, which a runtime that takes this plugin never calls. */
static void *BC_CALL create_v1(const BcOp *op, const BcApi *api, const BcInfo *info) {
  return (void)op, (void)api, (void)info, NULL;
}
static void BC_CALL compute_v1(void *kernel, BcContext *context) { (void)kernel, (void)context; }

static const BcOp callbacks = {
    .version = BC_ORT_API,
    .CreateKernel = create_v1,
    .GetName = get_name,
    .GetExecutionProviderType = get_provider,
    .GetInputType = input_type,
    .GetInputTypeCount = input_count,
    .GetOutputType = output_type,
    .GetOutputTypeCount = output_count,
    .KernelCompute = compute_v1,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = zero_of, /* required */
    .GetOutputCharacteristic = zero_of,
    .GetInputMemoryType = zero_of,
    .GetVariadicInputMinArity = one,
    .GetVariadicInputHomogeneity = one,
    .GetVariadicOutputMinArity = one,
    .GetVariadicOutputHomogeneity = one,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .InferOutputShapeFn = infer,
    .GetStartVersion = one,
    .GetEndVersion = any_version,
};

static int supported(const bc_variant *variant) {
  char list[256], *rest = list;
  snprintf(list, sizeof list, "%s", variant->features);
  while (*rest) {
    char *end = strchr(rest, ',');
    if (end) *end = 0;
    if (!bc_cpu_has(rest)) return 0;
    if (!end) break;
    rest = end + 1;
  }
  return 1;
}

/* The best variant this CPU runs, or the one BITCOMPILE_ISA names. */
static BcStatus *choose(const BcApi *api, const bc_variant **out) {
  const char *wanted = getenv("BITCOMPILE_ISA");
  char runs[256] = "";
  size_t used = 0;
  *out = NULL;
  for (int i = 0; i < bc_variant_count; i++) {
    const bc_variant *v = &bc_variants[i];
    if (!supported(v)) continue;
    if (used < sizeof runs)
      used += (size_t)snprintf(runs + used, sizeof runs - used, "%s%s", used ? ", " : "", v->isa);
    if (!*out && (!wanted || !*wanted || !strcmp(wanted, v->isa))) *out = v;
  }
  if (*out) return NULL;
  if (!used)
    return fail(api, BC_FAIL, "bitcompile: this CPU runs none of the plugin's kernels; build the "
                "artifact for this machine");
  return fail(api, BC_INVALID_ARGUMENT, "bitcompile: BITCOMPILE_ISA=%s is not a variant that this "
              "plugin has and this CPU runs; choose one of: %s", wanted, runs);
}

static BcStatus *BC_CALL register_ops(BcOptions *options, const BcApiBase *base) {
  const BcApi *api = base->GetApi(BC_ORT_API);
  const bc_variant *variant = NULL;
  BcDomain *domain = NULL;
  if (!api) {
    const BcApi *oldest = base->GetApi(1);
    return oldest ? fail(oldest, BC_FAIL, "bitcompile: this plugin needs ONNX Runtime 1.17 or newer, "
                         "not %s: upgrade onnxruntime", base->GetVersionString())
                  : NULL;
  }
  TRY(choose(api, &variant));
  /* The domain and its operators must outlive every session made from the options, and the runtime
   * never says when the last is gone: they stay, about a kilobyte a registration. */
  Operator *ops = calloc(SPECS, sizeof *ops);
  if (!ops) return fail(api, BC_FAIL, "bitcompile: out of memory");
  TRY(ort_CreateCustomOpDomain(api)("bitcompile", &domain));
  for (size_t i = 0; i < SPECS; i++) {
    ops[i] = (Operator){.base = callbacks, .api = api, .variant = variant, .spec = &specs[i]};
    TRY(ort_CustomOpDomain_Add(api)(domain, &ops[i].base));
  }
  return ort_AddCustomOpDomain(api)(options, domain);
}

#ifdef BC_STATIC /* linked into a program beside other plugins: a name of our own */
BC_EXPORT BcStatus *BC_CALL bitcompile_RegisterCustomOps(BcOptions *options, const BcApiBase *base) {
  return register_ops(options, base);
}
#else
BC_EXPORT BcStatus *BC_CALL RegisterCustomOps(BcOptions *options, const BcApiBase *base) {
  return register_ops(options, base);
}
#endif
