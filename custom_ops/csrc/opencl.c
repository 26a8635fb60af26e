/* The operators on an OpenCL device: what a call needs goes up once, its result comes down once.
 *
 * The nodes are the CPU provider's, so that tensors stay where ONNX Runtime keeps them and any call
 * can be left to the CPU kernels of the same plugin. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr */
#endif
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "opencl.h"

enum {
  TILE_ROWS = 16,
  TILE_BYTES = 64,
  DECODE_ROWS = 8,  /* up to here a call is decode */
  GEMV_ROWS = 2,    /* up to here a gemv, above a gemm */
  PASS_ROWS = 1024, /* rows of one pass, which bounds the device's memory */
};

enum { OFFLOAD_AUTO, OFFLOAD_NONE, OFFLOAD_PREFILL, OFFLOAD_ALL };
static const char *const offloads[] = {"auto", "none", "prefill", "all"};

typedef struct State { /* of a registration */
  Cl *cl;              /* NULL to leave everything to the CPU */
  const void *cpu;     /* state of the CPU's kernels, NULL without them */
  int alone;           /* the CPU's kernels may not take over */
  int offload;
} State;

static const State *state_of(const Kernel *k) { return k->state; }

/* One device a process: its queue and buffers are used under this lock. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Cl *shared_device;

/* ---- opening --------------------------------------------------------------------------------- */

/* Says once why the CPU does the device's work. */
static void say_fallback(const char *why) {
  static int said;
  pthread_mutex_lock(&lock);
  int again = said;
  said = 1;
  pthread_mutex_unlock(&lock);
  if (again) return;
  fprintf(stderr, "bitcompile: %s; the CPU kernels take over\n", why);
}

static int offload_named(const char *text) {
  for (int i = OFFLOAD_AUTO; i <= OFFLOAD_ALL; i++)
    if (!strcmp(text, offloads[i])) return i;
  return -1;
}

/* What a calibration measured: the first word of "<library>.offload". */
static int calibrated(void) {
  char path[1024], word[16] = "";
  Dl_info self;
  if (!dladdr((const void *)&bc_opencl_device, &self) || !self.dli_fname) return -1;
  snprintf(path, sizeof path, "%s.offload", self.dli_fname);
  FILE *file = fopen(path, "r");
  if (!file) return -1;
  size_t length = fread(word, 1, sizeof word - 1, file), end = 0;
  fclose(file);
  while (end < length && word[end] > ' ') end++;
  word[end] = 0;
  return offload_named(word);
}

/* BITCOMPILE_OFFLOAD, else a calibration, else what the build chose. */
static BcStatus *choose_offload(const BcApi *api, int *out) {
  const char *wanted = getenv("BITCOMPILE_OFFLOAD");
  if (wanted && *wanted) {
    *out = offload_named(wanted);
    if (*out >= 0) return NULL;
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile: BITCOMPILE_OFFLOAD=%s; choose one of: auto, none, prefill, all",
                   wanted);
  }
  *out = calibrated();
  if (*out < 0) *out = offload_named(bc_cl_offload);
  return NULL;
}

/* auto: a device with memory of its own gets everything; one that shares the host's cannot read
 * weights faster than the CPU, so it gets prefill, whose time goes into products. */
static int automatic(const Cl *cl) { return cl->unified ? OFFLOAD_PREFILL : OFFLOAD_ALL; }

static void tell(const Cl *cl) {
  static const char *const dots[] = {"plain", "cl_khr_integer_dot_product",
                                     "cl_arm_integer_dot_product_accumulate_int8",
                                     "cl_qcom_dot_product8", "cl_arm_integer_dot_product_int8"};
  if (cl->broken) return;
  fprintf(stderr, "bitcompile: %s, driver %s, dot product: %s, memory: %s, weights: %s%s\n",
          cl->name, cl->driver, dots[cl->dot], cl->unified ? "the host's" : "its own",
          cl->zero_copy ? "in place" : "copied", cl->from_cache ? ", program from the cache" : "");
}

/* The process's device, opened at the first call. */
static Cl *device(void) {
  pthread_mutex_lock(&lock);
  if (!shared_device && (shared_device = calloc(1, sizeof *shared_device))) {
    shared_device->broken = bc_cl_open(shared_device);
    if (getenv("BITCOMPILE_VERBOSE")) tell(shared_device);
  }
  pthread_mutex_unlock(&lock);
  return shared_device;
}

/* BITCOMPILE_ISA: the target's name for the device alone, a CPU variant for the CPU alone. */
static BcStatus *open_opencl(const BcApi *api, const void **out) {
  const char *wanted = getenv("BITCOMPILE_ISA");
  if (wanted && !*wanted) wanted = NULL;
  int device_only = !bc_cl_cpu || (wanted && !strcmp(wanted, bc_cl_target));
  if (!bc_cl_cpu && wanted && strcmp(wanted, bc_cl_target))
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile: BITCOMPILE_ISA=%s is not a variant of this plugin; choose: %s",
                   wanted, bc_cl_target);
  State *state = calloc(1, sizeof *state);
  if (!state) return bc_fail(api, BC_FAIL, "bitcompile: out of memory");
  BcStatus *status = NULL;
  if (bc_cl_cpu) status = bc_cl_cpu_open(api, device_only ? NULL : wanted, &state->cpu);
  if (!status) status = choose_offload(api, &state->offload);
  if (device_only) state->offload = OFFLOAD_ALL;
  state->alone = device_only;
  if (!status && (device_only || !wanted) && state->offload != OFFLOAD_NONE) {
    Cl *cl = device();
    const char *why = cl ? cl->fault : "out of memory";
    if (cl && !cl->broken)
      state->cl = cl;
    else if (device_only)
      status = bc_fail(api, BC_FAIL, "bitcompile: %s", why);
    else
      say_fallback(why);
    if (state->cl && state->offload == OFFLOAD_AUTO) state->offload = automatic(cl);
  }
  if (status)
    free(state);
  else
    *out = state;
  return status;
}

/* ---- constants on the device ----------------------------------------------------------------- */

static size_t bytes_of(const Kernel *k, size_t input, const Tensor *t) {
  return (size_t)bc_elements(t) * (k->spec->bytes_inputs >> input & 1 ? 1 : 4);
}

/* Of a node: its inputs that never change, NULL for the others. No other node shares them: the
 * runtime unmaps tensors before it ends nodes, and another session's may lie there by then. */
typedef struct Constants {
  ClMem mem[MAX_INPUTS];
} Constants;

static void detach(Kernel *k) {
  Constants *own = k->own;
  if (!own) return;
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < MAX_INPUTS; i++)
    if (own->mem[i]) state_of(k)->cl->api.ReleaseMemObject(own->mem[i]);
  pthread_mutex_unlock(&lock);
  free(own);
  k->own = NULL;
}

/* Fault of the device to the runtime, or to the user and the CPU. */
static BcStatus *give_up(const Kernel *k, const char *why) {
  if (state_of(k)->alone) return bc_fail(k->api, BC_FAIL, "bitcompile::%s: %s", k->spec->name, why);
  say_fallback(why);
  return NULL;
}

static BcStatus *attach(Kernel *k) {
  Cl *cl = state_of(k)->cl;
  char why[sizeof cl->fault] = "";
  if (!cl || k->op == BC_ROOF) return NULL;
  Constants *own = k->own = calloc(1, sizeof *own);
  if (!own) return bc_fail(k->api, BC_FAIL, "bitcompile::%s: out of memory", k->spec->name);
  pthread_mutex_lock(&lock);
  if (cl->broken) snprintf(why, sizeof why, "%s", cl->fault);
  for (size_t i = 1; i < k->spec->inputs && !why[0]; i++) {
    const Tensor *t = &k->fixed[i];
    if (!(k->constant >> i & 1) || t->rank == 0 || bc_elements(t) == 0) continue;
    own->mem[i] = bc_cl_constant(cl, t->data, bytes_of(k, i, t));
    if (own->mem[i]) continue;
    snprintf(why, sizeof why, "%s", cl->fault[0] ? cl->fault : "out of memory");
    cl->fault[0] = 0; /* this node alone stays on the CPU */
  }
  pthread_mutex_unlock(&lock);
  if (!why[0]) return NULL;
  detach(k);
  return give_up(k, why);
}

/* ---- a call ---------------------------------------------------------------------------------- */

typedef struct Call { /* under the lock */
  const Kernel *k;
  Cl *cl;
  const Tensor *in;
  ClMem mem[MAX_INPUTS], passing[MAX_INPUTS]; /* on the device; those of them only for this call */
  ClMem none;                                 /* stands for an absent tensor */
} Call;

static BcStatus *on_cpu(const Kernel *k, BcContext *context) {
  Kernel copy = *k;
  copy.device = bc_cl_cpu;
  copy.state = state_of(k)->cpu;
  return bc_cl_cpu->compute[k->op](&copy, context);
}

static int begin(Call *c) {
  const Constants *own = c->k->own;
  if (bc_cl_room(c->cl, BUFFER_S, PASS_ROWS * 4)) return 1;
  c->none = c->cl->buffer[BUFFER_S].mem;
  for (size_t i = 1; i < c->k->spec->inputs; i++) {
    const Tensor *t = &c->in[i];
    c->mem[i] = own->mem[i];
    /* The residual goes up with x. */
    if (c->mem[i] || t->rank == 0 || (i == c->k->spec->inputs - 1 && c->k->op != BC_HEAD_LINEAR))
      continue;
    c->passing[i] = c->mem[i] = bc_cl_constant(c->cl, t->data, bytes_of(c->k, i, t));
    if (!c->mem[i]) return 1;
  }
  return 0;
}

static void end(Call *c) {
  for (size_t i = 0; i < MAX_INPUTS; i++)
    if (c->passing[i]) c->cl->api.ReleaseMemObject(c->passing[i]);
}

static ClMem buffer(const Call *c, int which) { return c->cl->buffer[which].mem; }

/* One transfer up: rows of x, then of the residual, unless that is x itself. */
static int send(Call *c, const float *x, int64_t x_count, const float *residual, int64_t count,
                int64_t *residual_at) {
  int32_t code = 0;
  char why[64];
  int same = residual == x && count == x_count;
  int64_t total = x_count + (residual && !same ? count : 0);
  *residual_at = same ? 0 : x_count;
  if (bc_cl_room(c->cl, BUFFER_IN, total * 4)) return 1;
  float *to =
      c->cl->api.EnqueueMapBuffer(c->cl->queue, buffer(c, BUFFER_IN), 1, (uint64_t)CL_WRITING, 0,
                                  (size_t)total * 4, 0, NULL, NULL, &code);
  if (to && !code) {
    memcpy(to, x, (size_t)x_count * 4);
    if (total > x_count) memcpy(to + x_count, residual, (size_t)count * 4);
    code = c->cl->api.EnqueueUnmapMemObject(c->cl->queue, buffer(c, BUFFER_IN), to, 0, NULL, NULL);
  }
  if (to && !code) return 0;
  return bc_cl_fault(c->cl, "%s does not take activations, %s", c->cl->name,
                     bc_cl_error(code, why, sizeof why));
}

/* One transfer down, which waits for the work. */
static int receive(Call *c, float *y, int64_t count) {
  int32_t code = 0;
  char why[64];
  const float *from =
      c->cl->api.EnqueueMapBuffer(c->cl->queue, buffer(c, BUFFER_OUT), 1, (uint64_t)CL_READING, 0,
                                  (size_t)count * 4, 0, NULL, NULL, &code);
  if (from && !code) {
    memcpy(y, from, (size_t)count * 4);
    code = c->cl->api.EnqueueUnmapMemObject(c->cl->queue, buffer(c, BUFFER_OUT), (void *)from, 0,
                                            NULL, NULL);
    if (!code) code = c->cl->api.Finish(c->cl->queue);
  }
  if (from && !code) return 0;
  return bc_cl_fault(c->cl, "%s did not finish its work, %s", c->cl->name,
                     bc_cl_error(code, why, sizeof why));
}

/* Norm (if gamma), quantisation and group sums of M rows of K values. */
static int quantize(Call *c, ClMem x, ClMem gamma, int64_t M, int64_t K) {
  const Kernel *k = c->k;
  int64_t KB = bc_ceil_div(K, TILE_ROWS), G = bc_groups(k, K);
  int32_t Kp = (int32_t)KB * TILE_ROWS, width = (int32_t)K;
  if (bc_cl_room(c->cl, BUFFER_Q, M * Kp) || bc_cl_room(c->cl, BUFFER_SUMS, M * G * 4)) return 1;
  ClMem q = buffer(c, BUFFER_Q), s = buffer(c, BUFFER_S), sums = buffer(c, BUFFER_SUMS);
  if (gamma ? bc_cl_launch(c->cl, CLK_NORM_QUANTIZE, M, 1, "bbbbbiif", x, gamma, q, s, sums, width,
                           Kp, (double)k->eps)
            : bc_cl_launch(c->cl, CLK_QUANTIZE, M, 1, "bbbbii", x, q, s, sums, width, Kp))
    return 1;
  if (!k->group_size) return 0;
  return bc_cl_launch(c->cl, CLK_GROUP_SUMS, M, 1, "bbiii", q, sums, Kp, (int32_t)G,
                      (int32_t)(k->group_size / TILE_ROWS));
}

typedef struct Product { /* of the quantised rows with one weight */
  ClMem w, scale, bias, residual, y;
  int64_t residual_at, M, N, K;
} Product;

static int multiply(Call *c, const Product *p) {
  static const int kernels[2][2] = {{CLK_GEMM, CLK_GEMM_GROUPED}, {CLK_GEMV, CLK_GEMV_GROUPED}};
  int grouped = c->k->group_size != 0;
  int which = kernels[p->M <= GEMV_ROWS][grouped];
  const bc_cl_kernel *kernel = &bc_cl_kernels[which];
  return bc_cl_launch(
      c->cl, which, bc_ceil_div(p->N, kernel->rows[0]), bc_ceil_div(p->M, kernel->rows[1]),
      grouped ? "bbbbbbbbiiiiiiii" : "bbbbbbbbiiiiii", p->w, buffer(c, BUFFER_Q),
      buffer(c, BUFFER_SUMS), buffer(c, BUFFER_S), p->scale, p->bias ? p->bias : c->none,
      p->residual ? p->residual : c->none, p->y, (int32_t)p->N, (int32_t)p->M,
      (int32_t)bc_ceil_div(p->K, TILE_ROWS), (int32_t)p->residual_at, p->bias != NULL,
      p->residual != NULL, (int32_t)bc_groups(c->k, p->K), (int32_t)(c->k->group_size / TILE_ROWS));
}

/* M rows on the device. */
typedef int rows_fn(Call *, const float *x, const float *residual, float *y, int64_t M);

/* BitLinear(x, w, w_scale, bias, residual), NormBitLinear(x, gamma, w, w_scale, bias, residual) */
static int linear_rows(Call *c, const float *x, const float *residual, float *y, int64_t M) {
  const Kernel *k = c->k;
  size_t first = k->op == BC_NORM_BIT_LINEAR ? 2 : 1;
  Product p = {.w = c->mem[first], .scale = c->mem[first + 1], .M = M, .N = k->N, .K = k->K};
  if (c->in[first + 2].rank) p.bias = c->mem[first + 2];
  if (send(c, x, M * k->K, residual, M * k->N, &p.residual_at) ||
      bc_cl_room(c->cl, BUFFER_OUT, M * k->N * 4) ||
      quantize(c, buffer(c, BUFFER_IN), first == 2 ? c->mem[1] : NULL, M, k->K))
    return 1;
  if (residual) p.residual = buffer(c, BUFFER_IN);
  p.y = buffer(c, BUFFER_OUT);
  return multiply(c, &p) || receive(c, y, M * k->N);
}

static int glu_rows(Call *c, const float *x, const float *residual, float *y, int64_t M) {
  const Kernel *k = c->k;
  Product up = {.w = c->mem[2], .scale = c->mem[3], .M = M, .N = 2 * k->F, .K = k->K};
  Product down = {.w = c->mem[5], .scale = c->mem[6], .M = M, .N = k->N, .K = k->F};
  int64_t columns = bc_cl_kernels[CLK_GLU].items[0];
  if (send(c, x, M * k->K, residual, M * k->N, &down.residual_at) ||
      bc_cl_room(c->cl, BUFFER_BOTH, 2 * M * k->F * 4) ||
      bc_cl_room(c->cl, BUFFER_HIDDEN, M * k->F * 4) ||
      bc_cl_room(c->cl, BUFFER_OUT, M * k->N * 4) ||
      quantize(c, buffer(c, BUFFER_IN), c->mem[1], M, k->K))
    return 1;
  up.y = buffer(c, BUFFER_BOTH);
  down.y = buffer(c, BUFFER_OUT);
  if (residual) down.residual = buffer(c, BUFFER_IN);
  return multiply(c, &up) ||
         bc_cl_launch(c->cl, CLK_GLU + (int)k->activation, bc_ceil_div(k->F, columns), M, "bbi",
                      up.y, buffer(c, BUFFER_HIDDEN), (int32_t)k->F) ||
         quantize(c, buffer(c, BUFFER_HIDDEN), k->sub_norm ? c->mem[4] : NULL, M, k->F) ||
         multiply(c, &down) || receive(c, y, M * k->N);
}

static int head_rows(Call *c, const float *x, const float *none, float *y, int64_t M) {
  const Kernel *k = c->k;
  int64_t B = bc_ceil_div(k->K, k->block), width = B * k->block, at;
  int bits8 = k->bits == 8;
  int which = bits8 ? CLK_HEAD8 : CLK_HEAD4;
  if (send(c, x, M * k->K, none, 0, &at) || bc_cl_room(c->cl, BUFFER_Q, M * width) ||
      bc_cl_room(c->cl, BUFFER_LO, M * width) || bc_cl_room(c->cl, BUFFER_OUT, M * k->N * 4))
    return 1;
  ClMem hi = buffer(c, BUFFER_Q), lo = buffer(c, BUFFER_LO), s = buffer(c, BUFFER_S);
  return bc_cl_launch(c->cl, bits8 ? CLK_HEAD_QUANTIZE8 : CLK_HEAD_QUANTIZE4, M, 1, "bbbbii",
                      buffer(c, BUFFER_IN), hi, lo, s, (int32_t)k->K, (int32_t)width) ||
         bc_cl_launch(c->cl, which, bc_ceil_div(k->N, bc_cl_kernels[which].rows[0]), M, "bbbbbbiii",
                      c->mem[1], c->mem[2], hi, lo, s, buffer(c, BUFFER_OUT), (int32_t)k->N,
                      (int32_t)B, (int32_t)(k->block * k->bits / 8 / TILE_BYTES)) ||
         receive(c, y, M * k->N);
}

/* All M rows, in passes. `widest`: values of the longest row, for the kernels' int32 offsets. */
static int run(Call *c, rows_fn *rows, const float *residual, float *y, int64_t M, int64_t widest) {
  const Kernel *k = c->k;
  int64_t most = bc_min64(bc_min64(M, PASS_ROWS), INT32_MAX / widest);
  int failed = begin(c);
  for (int64_t m = 0; m < M && !failed; m += most)
    failed = rows(c, (const float *)c->in[0].data + m * k->K, residual ? residual + m * k->N : NULL,
                  y + m * k->N, bc_min64(most, M - m));
  if (failed) c->cl->api.Finish(c->cl->queue);
  end(c);
  return failed;
}

/* ---- the operators --------------------------------------------------------------------------- */

static rows_fn *const rows_of[BC_OPS] = {linear_rows, linear_rows, glu_rows, head_rows, NULL};

/* What the device is given, by the choice of work and the rows of the call. */
static int repays(const Kernel *k, int64_t M) {
  const State *state = state_of(k);
  if (!k->own || state->cl->broken) return state->alone;
  return state->offload == OFFLOAD_ALL || (state->offload == OFFLOAD_PREFILL && M > DECODE_ROWS);
}

static BcStatus *compute(const Kernel *k, BcContext *context) {
  Call call = {.k = k, .cl = state_of(k)->cl};
  int64_t widest = bc_max64(bc_max64(k->K + k->N, 2 * k->F), k->K + 2 * k->block);
  char why[sizeof call.cl->fault];
  Node node;
  TRY(bc_open_node(k, context, &node));
  if (node.M == 0) return NULL;
  if (!repays(k, node.M)) return on_cpu(k, context);
  call.in = node.in;
  pthread_mutex_lock(&lock);
  int failed = call.cl->broken ||
               run(&call, rows_of[k->op], node.residual, (float *)node.y.data, node.M, widest);
  call.cl->broken = failed;
  snprintf(why, sizeof why, "%s", call.cl->fault);
  pthread_mutex_unlock(&lock);
  if (!failed) return NULL;
  TRY(give_up(k, why));
  return on_cpu(k, context);
}

static BcStatus *compute_roof(const Kernel *k, BcContext *context) {
  if (state_of(k)->cpu) return on_cpu(k, context);
  return bc_fail(k->api, BC_FAIL, "bitcompile::Roof: this plugin has no CPU kernels to measure");
}

static const int types[] = {BC_FLOAT, 0};

const Device bc_opencl_device = {
    .types = types,
    .open = open_opencl,
    .compute = {compute, compute, compute, compute, compute_roof},
    .attach = attach,
    .detach = detach,
};
