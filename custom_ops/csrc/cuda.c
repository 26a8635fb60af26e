/* The operators on an NVIDIA GPU, for ONNX Runtime's CUDA provider: on its stream, in its memory,
 * without a copy or a wait, so that CUDA graphs capture them. */
#include "cuda_launch.h"
#include "ops.h"

/* Rows of one pass of BitGLU, and of a head, which bound their memory. */
enum { PASS_ROWS = 2048, HEAD_ROWS = 1024, ALIGN = 256 };

typedef struct Run { /* one call */
  const bc_gpu *gpu;
  void *stream;
  BcAllocator *allocator;
  char *scratch;
} Run;

static int64_t padded(int64_t bytes) { return bc_ceil_div(bytes, ALIGN) * ALIGN; }

static BcStatus *start(const Kernel *k, BcContext *context, Run *run) {
  const char *error = NULL;
  *run = (Run){0};
  TRY(ort_KernelContext_GetGPUComputeStream(k->api)(context, &run->stream));
  run->gpu = bc_cuda_gpu(&error);
  return error ? bc_fail(k->api, BC_FAIL, "bitcompile: CUDA: %s", error) : NULL;
}

/* Memory of the provider's arena; the stream orders its next use. */
static BcStatus *allocate(const Kernel *k, BcContext *context, int64_t bytes, Run *run) {
  BcMemoryInfo *memory = NULL;
  if (!bytes) return NULL;
  TRY(ort_CreateMemoryInfo(k->api)("Cuda", BC_ARENA, run->gpu->device, BC_MEM_DEFAULT, &memory));
  BcStatus *status = ort_KernelContext_GetAllocator(k->api)(context, memory, &run->allocator);
  ort_ReleaseMemoryInfo(k->api)(memory);
  if (status) return status;
  run->scratch = run->allocator->Alloc(run->allocator, (size_t)bytes);
  if (run->scratch) return NULL;
  ort_ReleaseAllocator(k->api)(run->allocator);
  return bc_fail(
      k->api, BC_FAIL,
      "bitcompile::%s: out of GPU memory for %lld bytes of scratch; use shorter sequences",
      k->spec->name, (long long)bytes);
}

static BcStatus *finish(const Kernel *k, Run *run, int result) {
  if (run->scratch) {
    run->allocator->Free(run->allocator, run->scratch);
    ort_ReleaseAllocator(k->api)(run->allocator);
  }
  if (!result) return NULL;
  return bc_fail(k->api, BC_FAIL, "bitcompile::%s: CUDA: %s", k->spec->name, bc_cuda_error(result));
}

static int64_t bytes_of(const Kernel *k) { return k->type == BC_FLOAT ? 4 : 2; }
static const void *row(const Kernel *k, const void *p, int64_t elements) {
  return p ? (const char *)p + elements * bytes_of(k) : NULL;
}
/* Whether all inputs in the mask are constants. */
static int fixed(const Kernel *k, uint32_t mask) { return (k->constant & mask) == mask; }

/* BitLinear(x, w, w_scale, bias, residual), NormBitLinear(x, gamma, w, w_scale, bias, residual) */
static BcStatus *compute_linear(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS], y;
  Run run;
  int64_t M, gamma_shape[] = {k->K}, bias_shape[] = {k->N};
  TRY(bc_read_inputs(k, context, in));
  const Tensor *rest = &in[1 + k->spec->has_norm];
  bc_linear job = {.K = (int32_t)k->K, .N = (int32_t)k->N, .eps = k->eps};
  job.group_size = (int32_t)k->group_size;
  job.gate_in = job.gate_out = BC_NO_GATE;
  job.type_x = job.type_y = k->type;
  job.early = fixed(k, ((1u << (k->spec->inputs - 1)) - 1) & ~k->spec->typed_inputs);
  TRY(bc_expect_weight(k, "w", &rest[0], "w_scale", &rest[1], k->N, k->K));
  if (k->spec->has_norm) TRY(bc_expect(k, "gamma", &in[1], 1, gamma_shape));
  TRY(bc_open_rows(k, context, &in[0], k->K, k->N, &y, &M));
  TRY(bc_optional(k, "bias", &rest[2], 1, bias_shape, (const void **)&job.bias));
  TRY(bc_optional(k, "residual", &rest[3], y.rank, y.dim, &job.residual));
  if (M == 0) return NULL;
  job.M = (int32_t)M;
  job.x = in[0].data;
  job.gamma = k->spec->has_norm ? in[1].data : NULL;
  job.w = rest[0].data;
  job.w_scale = rest[1].data;
  job.y = (void *)y.data;
  TRY(start(k, context, &run));
  TRY(allocate(k, context, bc_cuda_linear_scratch(run.gpu, &job), &run));
  return finish(k, &run, bc_cuda_linear(run.gpu, run.stream, &job, run.scratch));
}

/* The two products of BitGLU. Hidden values stay float32: squared ReLU leaves float16's range. */
typedef struct Glu {
  bc_linear up, down;
  int64_t hidden, scratch; /* bytes */
} Glu;

static Glu plan(const Kernel *k, const bc_gpu *gpu, const Tensor *in, int64_t M) {
  bc_linear up = {.gamma = in[1].data, .w = in[2].data, .w_scale = in[3].data};
  bc_linear down = {.w = in[5].data, .w_scale = in[6].data};
  up.M = down.M = (int32_t)M;
  up.K = (int32_t)k->K;
  up.N = down.K = (int32_t)k->F;
  down.N = (int32_t)k->N;
  up.eps = down.eps = k->eps;
  up.group_size = down.group_size = (int32_t)k->group_size;
  up.type_x = down.type_y = k->type;
  up.type_y = down.type_x = BC_FLOAT;
  up.gate_in = down.gate_out = BC_NO_GATE;
  up.gate_out = (int32_t)k->activation;
  down.gate_in = BC_NO_GATE;
  if (k->sub_norm) down.gamma = in[4].data;
  up.early = down.early = fixed(k, 0x7e); /* all inputs but x and residual */
  up.x = in[0].data;
  if (!bc_cuda_gates(gpu, &up)) {
    down.gate_in = up.gate_out;
    up.gate_out = BC_NO_GATE;
    up.N *= 2;
  }
  Glu glu = {.up = up, .down = down, .hidden = padded(M * up.N * 4)};
  int64_t first = bc_cuda_linear_scratch(gpu, &up), second = bc_cuda_linear_scratch(gpu, &down);
  glu.scratch = glu.hidden + (first > second ? first : second);
  return glu;
}

static BcStatus *compute_bit_glu(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS], y;
  Run run;
  int64_t M, in_shape[] = {k->K}, sub_shape[] = {k->F};
  const void *residual;
  TRY(bc_read_inputs(k, context, in));
  TRY(bc_expect(k, "gamma_in", &in[1], 1, in_shape));
  TRY(bc_expect_weight(k, "w_gate_up", &in[2], "s_gate_up", &in[3], 2 * k->F, k->K));
  if (k->sub_norm) TRY(bc_expect(k, "gamma_sub", &in[4], 1, sub_shape));
  TRY(bc_expect_weight(k, "w_down", &in[5], "s_down", &in[6], k->N, k->F));
  TRY(bc_open_rows(k, context, &in[0], k->K, k->N, &y, &M));
  TRY(bc_optional(k, "residual", &in[7], y.rank, y.dim, &residual));
  if (M == 0) return NULL;
  TRY(start(k, context, &run));
  int64_t most = bc_min64(M, PASS_ROWS);
  TRY(allocate(k, context, plan(k, run.gpu, in, most).scratch, &run));
  int result = 0;
  for (int64_t m = 0; m < M && !result; m += most) {
    Glu glu = plan(k, run.gpu, in, bc_min64(most, M - m));
    void *rest = run.scratch + glu.hidden;
    glu.up.x = row(k, in[0].data, m * k->K);
    glu.up.y = run.scratch;
    glu.down.x = run.scratch;
    glu.down.y = (void *)row(k, y.data, m * k->N);
    glu.down.residual = row(k, residual, m * k->N);
    result = bc_cuda_linear(run.gpu, run.stream, &glu.up, rest);
    if (!result) result = bc_cuda_linear(run.gpu, run.stream, &glu.down, rest);
  }
  return finish(k, &run, result);
}

/* HeadLinear(x, table, scale) */
static BcStatus *compute_head(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS], y;
  Run run;
  int64_t M, B = bc_ceil_div(k->K, k->block);
  int64_t table_shape[] = {k->N, B, k->block * k->bits / 8}, scale_shape[] = {k->N, B, 1};
  TRY(bc_read_inputs(k, context, in));
  TRY(bc_expect(k, "table", &in[1], 3, table_shape));
  TRY(bc_expect(k, "scale", &in[2], 3, scale_shape));
  TRY(bc_open_rows(k, context, &in[0], k->K, k->N, &y, &M));
  if (M == 0) return NULL;
  TRY(start(k, context, &run));
  int64_t most = bc_min64(M, bc_min64(HEAD_ROWS, INT32_MAX / k->N)); /* offsets are int32 */
  bc_table job = {.table = in[1].data,
                  .scale = in[2].data,
                  .M = (int32_t)most,
                  .V = (int32_t)k->N,
                  .K = (int32_t)k->K,
                  .type_x = k->type,
                  .bits = (int32_t)k->bits,
                  .block = (int32_t)k->block,
                  .early = fixed(k, 6)};
  TRY(allocate(k, context, bc_cuda_head_scratch(&job), &run));
  int result = 0;
  for (int64_t m = 0; m < M && !result; m += most) {
    job.M = (int32_t)bc_min64(most, M - m);
    job.x = row(k, in[0].data, m * k->K);
    job.y = (float *)y.data + m * k->N;
    result = bc_cuda_head(run.gpu, run.stream, &job, run.scratch);
  }
  return finish(k, &run, result);
}

static BcStatus *open_cuda(const BcApi *api, const void **state) {
  const char *error = bc_cuda_open();
  *state = NULL;
  return error ? bc_fail(api, BC_FAIL, "bitcompile: this artifact is for CUDA: %s", error) : NULL;
}

static const int types[] = {BC_FLOAT, BC_FLOAT16, BC_BFLOAT16, 0};

const Device bc_cuda_device = {
    .provider = "CUDAExecutionProvider",
    .types = types,
    .remote = 1,
    .open = open_cuda,
    .compute = {compute_linear, compute_linear, compute_bit_glu, compute_head},
};
