/* The operators on a CPU: scratch memory and ONNX Runtime's threads around the kernels. Weights are
 * read where the runtime mapped them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "ops.h"
#include "pages.h"
#include "threads.h"

enum {
  TILE_ROWS = 16, /* weight rows and bytes of a tile, in every CPU layout */
  TILE_BYTES = 64,
  GROUP_COLUMNS = 16, /* columns of a tile where weights have group scales */
  DECODE_ROWS = 8,    /* up to here a gemv, above a gemm */
  GATED_TILES = 32,   /* most tiles of gate rows, and of up rows, that a decode task multiplies */
  FETCHED_LINES = 1 << 11, /* most that a waiting thread fetches: some of its L2 cache */
  MANY_THREADS = 16,
  STREAMS = 4, /* tiles that a gemv walks at a time, at most */
  ALIGN = 64,
};

static const bc_variant *variant(const Kernel *k) { return k->state; }

/* Columns with those that fill the last tile. */
static int64_t padded_columns(const Kernel *k, int64_t K) {
  return bc_ceil_div(K, k->layout->tile_columns) * k->layout->tile_columns;
}

/* ---- scratch memory -------------------------------------------------------------------------- */

typedef struct Scratch { /* one allocation, handed out piece by piece */
  BcAllocator *allocator;
  void *block;
  char *next;
} Scratch;

static int64_t padded(int64_t bytes) { return bc_ceil_div(bytes, ALIGN) * ALIGN; }

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
    return bc_fail(k->api, BC_FAIL,
                   "bitcompile::%s: out of memory for %lld bytes of scratch; use "
                   "shorter sequences",
                   k->spec->name, (long long)bytes);
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
static BcStatus *parallel(const Kernel *k, BcContext *context, bc_task_fn *task, int64_t count,
                          void *job) {
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
  int64_t Kp = padded_columns(k, K), padded_rows = M + BC_ROW_PAD;
  int64_t sums = padded_rows * bc_groups(k, K) * 4;
  return padded(padded_rows * Kp) + padded(padded_rows * 4) + padded(sums);
}

static Rows take_rows(const Kernel *k, Scratch *scratch, int64_t M, int64_t K) {
  Rows rows = {.Kp = padded_columns(k, K), .G = bc_groups(k, K)};
  rows.group_blocks = k->group_size / GROUP_COLUMNS;
  rows.q = take(scratch, (M + BC_ROW_PAD) * rows.Kp);
  rows.s = take(scratch, (M + BC_ROW_PAD) * 4);
  rows.qsum = take(scratch, (M + BC_ROW_PAD) * rows.G * 4);
  if (M <= DECODE_ROWS) return rows;
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
  int32_t count = (int32_t)bc_min64(j->step, j->M - m), K = (int32_t)j->K, Kp = (int32_t)j->to.Kp;
  const float *x = j->x + m * j->K;
  int8_t *q = j->to.q + m * j->to.Kp;
  /* With groups the row sums of the quantisation are replaced by those of the groups; G >= 1 leaves
   * room for both. */
  int32_t *qsum = j->to.qsum + m * j->to.G;
  if (j->glu) {
    const float *both = j->both + 2 * m * j->K;
    j->glu(both, both + K, j->hidden + m * j->K, count, K, 2 * K, K);
  }
  if (j->gamma)
    j->v->norm_quantize(x, j->gamma, q, j->to.s + m, qsum, count, K, Kp, j->eps);
  else
    j->v->quantize(x, q, j->to.s + m, qsum, count, K, Kp);
  if (j->to.group_blocks)
    j->v->group_sums(q, qsum, count, Kp, (int32_t)j->to.G, (int32_t)j->to.group_blocks);
}

static Phase rows_phase(const Kernel *k, RowJob *job) {
  job->v = variant(k);
  job->step = bc_ceil_div(1 << 14, job->K); /* ~16k values a task: microseconds */
  return (Phase){.task = row_task, .job = job, .count = bc_ceil_div(job->M, job->step)};
}

static BcStatus *run_rows(const Kernel *k, BcContext *context, RowJob *job) {
  Phase phase = rows_phase(k, job);
  return parallel(k, context, phase.task, phase.count, job);
}

typedef struct MatmulJob {
  const bc_variant *v;
  int coding; /* of w: BC_I2 ... */
  const uint8_t *w;
  const float *w_scale, *bias, *residual;
  Rows from;
  float *y;
  bc_glu_fn *glu; /* if set: w holds N gate rows, then N up rows; y is act(gate) * up */
  int64_t M, N, KB, ldy;
  int64_t step;    /* tiles of a task */
  int64_t m_step;  /* activation rows of a task */
  int64_t columns; /* tasks along N */
} MatmulJob;

static const float *at(const float *p, int64_t offset) { return p ? p + offset : NULL; }

/* The arguments every product kernel begins with, for `rows` weight rows from n and activation rows
 * from m on, into out, whose rows are ld apart. */
#define PRODUCT(j, n, rows, m, tiles, M, out, ld)                                              \
  (j)->w + (n) / TILE_ROWS *(j)->KB *TILE_BYTES,                                               \
      (const int32_t *)((j)->from.q + (m) * (j)->from.Kp), (j)->from.qsum + (m) * (j)->from.G, \
      (j)->from.s + (m), (j)->w_scale + (n) * (j)->from.G, at((j)->bias, n),                   \
      at((j)->residual, (m) * (j)->ldy + (n)), out, (int32_t)(rows), (int32_t)(ld),            \
      (j)->bias != NULL, (j)->residual != NULL, (int32_t)(tiles), (int32_t)(M), (int32_t)(j)->KB
#define GROUPS(j) (int32_t)(j)->from.G, (int32_t)(j)->from.group_blocks

/* Up to `rows` weight rows from n on, for all activation rows, into y. */
static void gemv_tiles(const MatmulJob *j, int64_t n, int64_t rows, float *y, int64_t ldy) {
  int64_t tiles = bc_min64(j->step, bc_ceil_div(rows, TILE_ROWS));
  if (j->from.group_blocks)
    j->v->gemv_grouped(PRODUCT(j, n, rows, 0, tiles, j->M, y, ldy), GROUPS(j));
  else
    j->v->gemv[j->coding](PRODUCT(j, n, rows, 0, tiles, j->M, y, ldy));
}

static void gemv_task(void *opaque, size_t i) {
  _Alignas(ALIGN) float both[2 * GATED_TILES * TILE_ROWS * DECODE_ROWS];
  MatmulJob *j = opaque;
  int64_t n = (int64_t)i * j->step * TILE_ROWS, rows = j->N - n;
  if (!j->glu) {
    gemv_tiles(j, n, rows, j->y + n, j->ldy);
    return;
  }
  int64_t width = j->step * TILE_ROWS, ld = 2 * width;
  gemv_tiles(j, n, rows, both, ld);
  gemv_tiles(j, j->N + n, rows, both + width, ld);
  j->glu(both, both + width, j->y + n, (int32_t)j->M, (int32_t)bc_min64(width, rows), (int32_t)ld,
         (int32_t)j->ldy);
}

/* Weights of a task, and of those after it that one of many threads would take too, by lines. */
static const void *weights_ahead(const void *opaque, int64_t task, int64_t i) {
  const MatmulJob *j = opaque;
  int64_t lines = j->step * j->KB, each = j->glu ? 2 * lines : lines, more = i / each;
  int64_t tiles = bc_ceil_div(j->N, TILE_ROWS), own = bc_ceil_div(tiles, j->step) / MANY_THREADS;
  int64_t line = (task + more) * lines + i % lines;
  if (i >= FETCHED_LINES || more > own || line >= tiles * j->KB) return NULL;
  if (i % each >= lines) line += tiles * j->KB; /* the up rows' */
  return j->w + line * TILE_BYTES;
}

/* One panel, up to `rows` weight rows from n on, for M activation rows from m on, into y. */
static void gemm_panel(const MatmulJob *j, int64_t n, int64_t rows, int64_t m, int64_t M, float *y,
                       int64_t ldy) {
  _Alignas(ALIGN) uint8_t panel[BC_MAX_PANEL];
  _Alignas(ALIGN) int32_t partial[BC_MAX_PARTIAL];
  int64_t tiles = bc_min64(j->step, bc_ceil_div(rows, TILE_ROWS));
  if (j->from.group_blocks)
    j->v->gemm_grouped(PRODUCT(j, n, rows, m, tiles, M, y, ldy), GROUPS(j), panel,
                       (float *)partial);
  else
    j->v->gemm[j->coding](PRODUCT(j, n, rows, m, tiles, M, y, ldy), panel, partial);
}

static void gemm_task(void *opaque, size_t i) {
  _Alignas(ALIGN) float both[2 * BC_MAX_PARTIAL];
  MatmulJob *j = opaque;
  int64_t n = ((int64_t)i % j->columns) * j->step * TILE_ROWS, rows = j->N - n;
  int64_t m = ((int64_t)i / j->columns) * j->m_step, M = bc_min64(j->m_step, j->M - m);
  float *y = j->y + m * j->ldy + n;
  if (!j->glu) {
    gemm_panel(j, n, rows, m, M, y, j->ldy);
    return;
  }
  /* Gate and up of the same columns meet in this thread's cache and never reach memory. */
  int64_t width = j->step * TILE_ROWS, ld = 2 * width;
  gemm_panel(j, n, rows, m, M, both, ld);
  gemm_panel(j, j->N + n, rows, m, M, both + width, ld);
  j->glu(both, both + width, y, (int32_t)M, (int32_t)bc_min64(width, rows), (int32_t)ld,
         (int32_t)j->ldy);
}

static int64_t prepare(const Kernel *k, MatmulJob *job) {
  job->v = variant(k);
  job->coding = k->layout->coding;
  job->KB = job->from.Kp / k->layout->tile_columns;
  job->ldy = job->N;
  return bc_ceil_div(job->N, TILE_ROWS);
}

static Phase gemv_phase(const Kernel *k, MatmulJob *job) {
  int64_t tiles = prepare(k, job), line = job->KB * TILE_BYTES * (job->glu ? 2 : 1);
  /* Some 64 KiB of weights a task. */
  int64_t walks = bc_max64(bc_ceil_div(1 << 16, line), bc_ceil_div(tiles, BC_MOST_TASKS));
  job->step = bc_ceil_div(walks, STREAMS) * STREAMS;
  if (job->glu) job->step = bc_min64(job->step, GATED_TILES);
  return (Phase){.task = gemv_task,
                 .job = job,
                 .count = bc_ceil_div(tiles, job->step),
                 .ahead = weights_ahead};
}

static BcStatus *run_gemm(const Kernel *k, BcContext *context, MatmulJob *job) {
  int64_t tiles = prepare(k, job);
  job->step = job->v->gemm_tiles;
  job->m_step = (int64_t)job->v->gemm_rows * BC_GEMM_BLOCKS;
  job->columns = bc_ceil_div(tiles, job->step);
  return parallel(k, context, gemm_task, job->columns * bc_ceil_div(job->M, job->m_step), job);
}

/* ---- the operators --------------------------------------------------------------------------- */

static BcStatus *compute_linear(const Kernel *k, BcContext *context) {
  Scratch scratch;
  Node n;
  TRY(bc_open_node(k, context, &n));
  if (n.M == 0) return NULL;
  TRY(open_scratch(k, context, rows_bytes(k, n.M, k->K), &scratch));
  const Tensor *w = &n.in[bc_weight_index(k)];
  RowJob rows = {.x = n.in[0].data, .M = n.M, .K = k->K, .eps = k->eps};
  if (k->op == BC_NORM_BIT_LINEAR) rows.gamma = n.in[1].data;
  rows.to = take_rows(k, &scratch, n.M, k->K);
  MatmulJob matmul = {.w = w[0].data,
                      .w_scale = w[1].data,
                      .bias = n.bias,
                      .residual = n.residual,
                      .from = rows.to,
                      .y = (float *)n.y.data,
                      .M = n.M,
                      .N = k->N};
  BcStatus *status;
  if (n.M <= DECODE_ROWS) {
    Phase phases[] = {rows_phase(k, &rows), gemv_phase(k, &matmul)};
    status = bc_run_phases(k, context, phases, 2);
  } else {
    status = run_rows(k, context, &rows);
    if (!status) status = run_gemm(k, context, &matmul);
  }
  close_scratch(k, &scratch);
  return status;
}

enum { PASS_ROWS = 1024 }; /* rows of one pass, which bounds the scratch memory */

static BcStatus *compute_bit_glu(const Kernel *k, BcContext *context) {
  Scratch scratch;
  Node n;
  TRY(bc_open_node(k, context, &n));
  if (n.M == 0) return NULL;

  const Tensor *in = n.in;
  int64_t M = n.M;
  int64_t most = bc_min64(M, PASS_ROWS);
  /* Gate and up rows are multiplied together where up begins with a tile; else they lie side by
   * side in `both`. */
  int fuse = k->F % TILE_ROWS == 0 && k->F <= GATED_TILES * TILE_ROWS * BC_MOST_TASKS;
  int64_t unfused = fuse ? 0 : most;
  int64_t bytes = rows_bytes(k, most, k->K) + rows_bytes(k, most, k->F);
  bytes += padded((most + 2 * unfused) * k->F * 4);
  TRY(open_scratch(k, context, bytes, &scratch));
  Rows outer = take_rows(k, &scratch, most, k->K), inner = take_rows(k, &scratch, most, k->F);
  float *hidden = take(&scratch, (most + 2 * unfused) * k->F * 4), *both = hidden + most * k->F;
  bc_glu_fn *glu = variant(k)->glu[k->activation];
  BcStatus *status = NULL;
  for (int64_t m = 0; m < M && !status; m += most) {
    int64_t count = bc_min64(most, M - m);
    RowJob norm = {.x = (const float *)in[0].data + m * k->K,
                   .gamma = in[1].data,
                   .to = outer,
                   .M = count,
                   .K = k->K,
                   .eps = k->eps};
    MatmulJob gate_up = {.w = in[2].data,
                         .w_scale = in[3].data,
                         .from = outer,
                         .y = fuse ? hidden : both,
                         .glu = fuse ? glu : NULL,
                         .M = count,
                         .N = fuse ? k->F : 2 * k->F};
    RowJob gate = {.both = both,
                   .glu = fuse ? NULL : glu,
                   .hidden = hidden,
                   .x = hidden,
                   .gamma = k->sub_norm ? in[4].data : NULL,
                   .to = inner,
                   .M = count,
                   .K = k->F,
                   .eps = k->eps};
    MatmulJob down = {.w = in[5].data,
                      .w_scale = in[6].data,
                      .from = inner,
                      .residual = at(n.residual, m * k->N),
                      .y = (float *)n.y.data + m * k->N,
                      .M = count,
                      .N = k->N};
    if (count <= DECODE_ROWS) {
      Phase phases[] = {rows_phase(k, &norm), gemv_phase(k, &gate_up), rows_phase(k, &gate),
                        gemv_phase(k, &down)};
      status = bc_run_phases(k, context, phases, 4);
      continue;
    }
    status = run_rows(k, context, &norm);
    if (!status) status = run_gemm(k, context, &gate_up);
    if (!status) status = run_rows(k, context, &gate);
    if (!status) status = run_gemm(k, context, &down);
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
  j->quantize(j->x + m * j->K, j->hi + m * j->width, j->lo + m * j->width,
              j->offset + m * j->B * 16, j->s + m, 1, (int32_t)j->K, (int32_t)j->B,
              (int32_t)j->per_block);
}

static void head_task(void *opaque, size_t i) {
  HeadJob *j = opaque;
  int64_t v = (int64_t)i * j->step;
  j->head(j->table + v * j->row_bytes, j->scale + v * j->B, j->hi, j->lo, j->offset, j->s, j->y + v,
          (int32_t)bc_min64(j->step, j->V - v), (int32_t)j->M, (int32_t)j->B, (int32_t)j->per_block,
          (int32_t)j->V);
}

static BcStatus *compute_head_linear(const Kernel *k, BcContext *context) {
  Scratch scratch;
  Node n;
  int64_t B = bc_ceil_div(k->K, k->block), block_bytes = k->block * k->bits / 8;
  TRY(bc_open_node(k, context, &n));
  if (n.M == 0) return NULL;
  int64_t M = n.M;
  HeadJob job = {.v = variant(k),
                 .table = n.in[1].data,
                 .scale = n.in[2].data,
                 .K = k->K,
                 .V = k->N,
                 .B = B,
                 .per_block = block_bytes / 64,
                 .row_bytes = B * block_bytes,
                 .width = B * k->block};
  job.quantize = k->bits == 8 ? variant(k)->head_quantize8 : variant(k)->head_quantize4;
  job.head = k->bits == 8 ? variant(k)->head8 : variant(k)->head4;
  job.step = bc_ceil_div(1 << 16, job.row_bytes);
  int64_t widest = job.width > k->N ? job.width : k->N;
  int64_t most =
      bc_min64(bc_min64(M, PASS_ROWS), INT32_MAX / widest); /* the kernels' offsets are int32 */
  int64_t bytes = 2 * padded(most * job.width) + padded(most * B * 64) + padded(most * 4);
  TRY(open_scratch(k, context, bytes, &scratch));
  job.hi = take(&scratch, most * job.width);
  job.lo = take(&scratch, most * job.width);
  job.offset = take(&scratch, most * B * 64);
  job.s = take(&scratch, most * 4);
  BcStatus *status = NULL;
  for (int64_t m = 0; m < M && !status; m += most) {
    job.M = bc_min64(most, M - m);
    job.x = (const float *)n.in[0].data + m * k->K;
    job.y = (float *)n.y.data + m * k->N;
    status = parallel(k, context, head_quantize_task, job.M, &job);
    if (!status) status = parallel(k, context, head_task, bc_ceil_div(k->N, job.step), &job);
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
  j->v->read_roof(j->data + first, out,
                  (int32_t)(bc_min64(ROOF_TASK, j->bytes - first) / ROOF_STEP));
}

static BcStatus *compute_roof(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS];
  BcValue *value = NULL;
  void *data = NULL;
  TRY(bc_read_inputs(k, context, in));
  RoofJob job = {.v = variant(k),
                 .data = in[0].data,
                 .bytes = bc_elements(&in[0]),
                 .kind = k->kind,
                 .steps = k->steps};
  if (job.bytes < ROOF_STEP)
    return bc_fail(k->api, BC_INVALID_ARGUMENT,
                   "bitcompile::Roof: data must hold at least %d bytes", ROOF_STEP);
  int64_t tasks = k->kind == ROOF_READ ? bc_ceil_div(job.bytes, ROOF_TASK) : DOT_TASKS;
  int64_t dim[] = {k->kind == ROOF_ABOUT ? 1 : tasks, 64};
  TRY(ort_KernelContext_GetOutput(k->api)(context, 0, dim, 2, &value));
  TRY(ort_GetTensorMutableData(k->api)(value, &data));
  job.out = data;
  memset(data, 0, (size_t)(dim[0] * 64));
  if (k->kind == ROOF_ABOUT) {
    snprintf(data, 64, "%s %lld %d", variant(k)->isa, (long long)variant(k)->dot_roof_macs,
             DOT_TASKS);
    return NULL;
  }
  return parallel(k, context, roof_task, tasks, &job);
}

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

/* The best variant this CPU runs, or the one called `wanted`. */
static BcStatus *choose(const BcApi *api, const char *wanted, const bc_variant **out) {
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
    return bc_fail(api, BC_FAIL,
                   "bitcompile: this CPU runs none of the plugin's kernels; build the "
                   "artifact for this machine");
  return bc_fail(api, BC_INVALID_ARGUMENT,
                 "bitcompile: BITCOMPILE_ISA=%s is not a variant that this "
                 "plugin has and this CPU runs; choose one of: %s",
                 wanted, runs);
}

BcStatus *bc_cpu_open(const BcApi *api, const char *wanted, const void **state) {
  const bc_variant *chosen = NULL;
  TRY(choose(api, wanted, &chosen));
  *state = chosen;
  return NULL;
}

static BcStatus *open_cpu(const BcApi *api, const void **state) {
  return bc_cpu_open(api, getenv("BITCOMPILE_ISA"), state);
}

static BcStatus *attach(Kernel *k) {
  MappedFile *file = NULL;
  for (size_t i = 0; i < k->spec->inputs; i++) {
    Tensor *t = &k->fixed[i];
    if (k->constant & k->spec->bytes_inputs & 1u << i)
      t->data = bc_huge_pages(t->data, (size_t)bc_elements(t), &file);
  }
  k->own = file;
  return NULL;
}

static void detach(Kernel *k) { bc_release_pages(k->own); }

static const int types[] = {BC_FLOAT, 0};

const Device bc_cpu_device = {
    .types = types,
    .open = open_cpu,
    .attach = attach,
    .detach = detach,
    .compute = {compute_linear, compute_linear, compute_bit_glu, compute_head_linear, compute_roof},
};
