/* The operators on an NVIDIA GPU, for ONNX Runtime's CUDA provider: on its stream, in its memory,
 * without a copy or a wait, so that CUDA graphs capture them. */
#include "cuda_launch.h"
#include "ops.h"

/* Rows of one pass, which bound scratch memory, grids and offsets of 32 bits. */
enum { LINEAR_ROWS = 1 << 16, GLU_ROWS = 2048, HEAD_ROWS = 1024, ALIGN = 256 };

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

/* A pass of rows after the other: their products' sizes and grids stay far from 32 bits. */
static BcStatus *compute_linear(const Kernel *k, BcContext *context) {
  Node n;
  Run run;
  size_t w = bc_weight_index(k);
  TRY(bc_open_node(k, context, &n));
  if (n.M == 0) return NULL;
  int64_t most = bc_min64(n.M, LINEAR_ROWS);
  bc_linear job = {.gamma = k->spec->has_norm ? n.in[1].data : NULL,
                   .w = n.in[w].data,
                   .w_scale = n.in[w + 1].data,
                   .bias = n.bias,
                   .M = (int32_t)most,
                   .N = (int32_t)k->N,
                   .K = (int32_t)k->K,
                   .type_x = k->type,
                   .type_y = k->type,
                   .gate_in = BC_NO_GATE,
                   .gate_out = BC_NO_GATE,
                   .group_size = (int32_t)k->group_size,
                   .eps = k->eps};
  job.x = n.in[0].data; /* its alignment decides how much scratch is needed */
  job.early = fixed(k, ((1u << (k->spec->inputs - 1)) - 1) & ~k->spec->typed_inputs);
  TRY(start(k, context, &run));
  TRY(allocate(k, context, bc_cuda_linear_scratch(run.gpu, &job), &run));
  int result = 0;
  for (int64_t m = 0; m < n.M && !result; m += most) {
    job.M = (int32_t)bc_min64(most, n.M - m);
    job.x = row(k, n.in[0].data, m * k->K);
    job.y = (void *)row(k, n.y.data, m * k->N);
    job.residual = row(k, n.residual, m * k->N);
    result = bc_cuda_linear(run.gpu, run.stream, &job, run.scratch);
  }
  return finish(k, &run, result);
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
  Node n;
  Run run;
  TRY(bc_open_node(k, context, &n));
  if (n.M == 0) return NULL;
  TRY(start(k, context, &run));
  int64_t most = bc_min64(n.M, GLU_ROWS);
  TRY(allocate(k, context, plan(k, run.gpu, n.in, most).scratch, &run));
  int result = 0;
  for (int64_t m = 0; m < n.M && !result; m += most) {
    Glu glu = plan(k, run.gpu, n.in, bc_min64(most, n.M - m));
    void *rest = run.scratch + glu.hidden;
    glu.up.x = row(k, n.in[0].data, m * k->K);
    glu.up.y = run.scratch;
    glu.down.x = run.scratch;
    glu.down.y = (void *)row(k, n.y.data, m * k->N);
    glu.down.residual = row(k, n.residual, m * k->N);
    result = bc_cuda_linear(run.gpu, run.stream, &glu.up, rest);
    if (!result) result = bc_cuda_linear(run.gpu, run.stream, &glu.down, rest);
  }
  return finish(k, &run, result);
}

static BcStatus *compute_head(const Kernel *k, BcContext *context) {
  Node n;
  Run run;
  TRY(bc_open_node(k, context, &n));
  if (n.M == 0) return NULL;
  TRY(start(k, context, &run));
  int64_t most = bc_min64(n.M, HEAD_ROWS);
  bc_table job = {.table = n.in[1].data,
                  .scale = n.in[2].data,
                  .M = (int32_t)most,
                  .V = (int32_t)k->N,
                  .K = (int32_t)k->K,
                  .type_x = k->type,
                  .bits = (int32_t)k->bits,
                  .block = (int32_t)k->block,
                  .early = fixed(k, 6)};
  TRY(allocate(k, context, bc_cuda_head_scratch(&job), &run));
  int result = 0;
  for (int64_t m = 0; m < n.M && !result; m += most) {
    job.M = (int32_t)bc_min64(most, n.M - m);
    job.x = row(k, n.in[0].data, m * k->K);
    job.y = (float *)n.y.data + m * k->N;
    result = bc_cuda_head(run.gpu, run.stream, &job, run.scratch);
  }
  return finish(k, &run, result);
}

/* Roof(data) -> bytes [1, 64], which nothing writes: reads all of data `steps` times. */
static BcStatus *compute_roof(const Kernel *k, BcContext *context) {
  Tensor in[MAX_INPUTS];
  BcValue *value = NULL;
  void *out = NULL;
  Run run;
  const int64_t dim[] = {1, 64};
  int result = 0;
  if (k->kind != 0)
    return bc_fail(k->api, BC_INVALID_ARGUMENT, "bitcompile::Roof: kind must be 0 on a GPU");
  TRY(bc_read_inputs(k, context, in));
  TRY(ort_KernelContext_GetOutput(k->api)(context, 0, dim, 2, &value));
  TRY(ort_GetTensorMutableData(k->api)(value, &out));
  TRY(start(k, context, &run));
  for (int64_t i = 0; i < k->steps && !result; i++)
    result = bc_cuda_read(run.gpu, run.stream, in[0].data, bc_elements(&in[0]), out);
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
    .compute = {compute_linear, compute_linear, compute_bit_glu, compute_head, compute_roof},
};
