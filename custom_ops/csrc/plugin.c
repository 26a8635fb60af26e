/* The ONNX Runtime custom-op plugin: registration, creation of kernels, and shape inference. */
#include <stdlib.h>
#include <string.h>

#include "ops.h"

typedef struct Operator { /* one per registration */
  BcOp base;              /* first: the runtime hands back a pointer to it */
  const BcApi *api;
  const Device *device;
  const void *state;
  int op, type;
} Operator;

static const Spec specs[BC_OPS] = {
    {"BitLinear", 5, 1u << 1, 1u << 0 | 1u << 4, 0, 0},
    {"NormBitLinear", 6, 1u << 2, 1u << 0 | 1u << 5, 1, 0},
    {"BitGLU", 8, 1u << 2 | 1u << 5, 1u << 0 | 1u << 7, 1, 0},
    {"HeadLinear", 3, 1u << 1, 1u << 0, 0, BC_FLOAT},
    {"Roof", 1, 1u << 0, 0, 0, BC_UINT8},
};

static const Spec *spec_of(const BcOp *op) { return &specs[((const Operator *)op)->op]; }

/* ---- kernel creation ------------------------------------------------------------------------- */

/* An int attribute; `otherwise` where the node has none, INT64_MIN (which no check accepts) where
 * it has a float of that name. */
static int64_t attribute(const BcApi *api, const BcInfo *info, const char *name,
                         int64_t otherwise) {
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

/* The layout of that name, NULL if the plugin does not read it. */
static const Layout *layout_of(const char *id) {
  for (const Layout *l = bc_layouts; l->id; l++)
    if (!strcmp(id, l->id)) return l;
  return NULL;
}

static BcStatus *check_attributes(Kernel *k, const BcInfo *info) {
  static const char *activations[BC_ACTIVATIONS] = {"relu2", "silu", "gelu_tanh", "gelu_erf"};
  const BcApi *api = k->api;
  const char *name = k->spec->name;
  char text[64];
  if (k->op == BC_ROOF) {
    if (k->kind >= 0 && k->kind <= 2 && k->steps >= 1 && k->steps <= INT32_MAX) return NULL;
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::Roof: kind = %lld, steps = %lld; kind must be 0..2 and steps 1 or "
                   "more",
                   (long long)k->kind, (long long)k->steps);
  }
  if (k->K < 1 || k->N < 1 || k->K > MAX_K || k->N > MAX_N)
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: K = %lld, N = %lld; K must be 1..%d and N "
                   "1..%d",
                   name, (long long)k->K, (long long)k->N, MAX_K, MAX_N);
  if (k->op == BC_HEAD_LINEAR) {
    if ((k->bits == 8 || k->bits == 4) && k->block > 0 && k->block <= MAX_BLOCK &&
        k->block * k->bits % (8 * 64) == 0)
      return NULL;
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: bits = %lld, block = %lld; bits must be 8 "
                   "or 4 and a block whole 64-byte chunks, at most %d weights",
                   name, (long long)k->bits, (long long)k->block, MAX_BLOCK);
  }
  if (k->spec->has_norm && !(k->eps >= 0 && k->eps < 1))
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: eps = %g; it is a float attribute from 0 to "
                   "1, and required",
                   name, (double)k->eps);
  attribute_text(api, info, "layout", text, sizeof text);
  k->layout = layout_of(text);
  if (!k->layout)
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: weights have layout '%s', which this plugin, unlike "
                   "'%s', does not read: build the artifact for this target",
                   name, text, bc_layouts->id);
  if (k->act_bits != 8)
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: this plugin computes act_bits = 8 only: "
                   "build the artifact with a bitcompile that has others",
                   name);
  int64_t g = k->group_size; /* 0, or a power of two from 16 to 256: a panel holds whole groups */
  if (g && (g < 16 || g > 256 || (g & (g - 1))))
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: group_size = %lld; it must be 0, 16, 32, "
                   "64, 128 or 256",
                   name, (long long)g);
  if (g % k->layout->tile_columns)
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: a scale per %lld columns does not fit layout "
                   "'%s': build the artifact with --layout i2",
                   name, (long long)g, k->layout->id);
  if (k->op != BC_BIT_GLU) return NULL;
  if (k->F < 1 || k->F > MAX_K || k->F2 != 2 * k->F)
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: F = %lld, F2 = %lld; F must be 1..%d and F2 "
                   "twice as much",
                   name, (long long)k->F, (long long)k->F2, MAX_K);
  if (k->sub_norm != 0 && k->sub_norm != 1)
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: sub_norm is an int attribute, 0 or 1, and "
                   "required",
                   name);
  attribute_text(api, info, "activation", text, sizeof text);
  for (int i = 0; i < BC_ACTIVATIONS; i++)
    if (!strcmp(text, activations[i])) {
      k->activation = i;
      return NULL;
    }
  return bc_fail(api, BC_INVALID_ARGUMENT,
                 "bitcompile::%s: activation '%s' is unknown; known: relu2, "
                 "silu, gelu_tanh, gelu_erf",
                 name, text);
}

static BcStatus *BC_CALL create(const BcOp *base, const BcApi *api, const BcInfo *info,
                                void **out) {
  const Operator *op = (const Operator *)base;
  Kernel *k = calloc(1, sizeof *k);
  *out = NULL;
  if (!k) return bc_fail(api, BC_FAIL, "bitcompile::%s: out of memory", specs[op->op].name);
  k->api = api;
  k->device = op->device;
  k->state = op->state;
  k->op = op->op;
  k->type = op->type;
  k->spec = &specs[op->op];
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
    status = bc_parse_tensor(k, i, value, &k->fixed[i]);
    k->constant |= 1u << i;
  }
  if (!status && k->device->attach) status = k->device->attach(k);
  if (status)
    free(k);
  else
    *out = k;
  return status;
}

static BcStatus *BC_CALL compute(void *kernel, BcContext *context) {
  const Kernel *k = kernel;
  return k->device->compute[k->op](k, context);
}

static void BC_CALL destroy(void *kernel) {
  Kernel *k = kernel;
  if (k->device->detach) k->device->detach(k);
  free(k);
}

static int BC_CALL output_type(const BcOp *op, size_t i) {
  int fixed = spec_of(op)->output;
  return (void)i, fixed ? fixed : ((const Operator *)op)->type;
}

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
  /* Whatever the registrations' types, the runtime asks the first of a name. */
  int type = spec_of(&op->base)->output;
  if (!type) TRY(ort_GetTensorElementType(api)(x, &type));
  TRY(ort_CreateTensorTypeAndShapeInfo(api)(&y));
  BcStatus *status = ort_SetTensorElementType(api)(y, type);
  if (!status) status = ort_SetDimensions(api)(y, dim, rank);
  if (!status) status = ort_SetSymbolicDimensions(api)(y, symbol, rank);
  if (!status) status = ort_ShapeInferContext_SetOutputTypeShape(api)(context, 0, y);
  ort_ReleaseTensorTypeAndShapeInfo(api)(y);
  return status;
}

static BcStatus *BC_CALL infer(const BcOp *base, BcInfer *context) {
  const Operator *op = (const Operator *)base;
  return op->op == BC_ROOF ? NULL : infer_shape(op, context);
}

/* ---- what ONNX Runtime asks of an operator --------------------------------------------------- */

static const char *BC_CALL get_name(const BcOp *op) { return spec_of(op)->name; }
static const char *BC_CALL get_provider(const BcOp *op) {
  return ((const Operator *)op)->device->provider;
}
static size_t BC_CALL input_count(const BcOp *op) { return spec_of(op)->inputs; }
static int BC_CALL input_type(const BcOp *op, size_t i) {
  if (spec_of(op)->bytes_inputs >> i & 1) return BC_UINT8;
  return spec_of(op)->typed_inputs >> i & 1 ? ((const Operator *)op)->type : BC_FLOAT;
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

static BcStatus *BC_CALL register_ops(BcOptions *options, const BcApiBase *base) {
  const BcApi *api = base->GetApi(BC_ORT_API);
  const void *state = NULL;
  BcDomain *domain = NULL;
  if (!api) {
    const BcApi *oldest = base->GetApi(1);
    return oldest ? bc_fail(oldest, BC_FAIL,
                            "bitcompile: this plugin needs ONNX Runtime 1.17 or newer, "
                            "not %s: upgrade onnxruntime",
                            base->GetVersionString())
                  : NULL;
  }
  TRY(bc_device->open(api, &state));
  /* The domain and its operators must outlive every session made from the options, and the runtime
   * never says when the last is gone: they stay, about a kilobyte a registration. */
  int types = 0;
  while (bc_device->types[types]) types++;
  Operator *op = calloc((size_t)(BC_OPS * types), sizeof *op);
  if (!op) return bc_fail(api, BC_FAIL, "bitcompile: out of memory");
  TRY(ort_CreateCustomOpDomain(api)("bitcompile", &domain));
  for (int i = 0; i < BC_OPS * types; i++, op++) {
    int number = i / types, type = i % types;
    if (!bc_device->compute[number] || (type && !specs[number].typed_inputs)) continue;
    *op = (Operator){.base = callbacks, .api = api, .device = bc_device, .state = state};
    op->op = number;
    op->type = bc_device->types[type];
    TRY(ort_CustomOpDomain_Add(api)(domain, &op->base));
  }
  return ort_AddCustomOpDomain(api)(options, domain);
}

#ifdef BC_STATIC /* linked into a program beside other plugins: a name of our own */
BC_EXPORT BcStatus *BC_CALL bitcompile_RegisterCustomOps(BcOptions *options,
                                                         const BcApiBase *base) {
  return register_ops(options, base);
}
#else
BC_EXPORT BcStatus *BC_CALL RegisterCustomOps(BcOptions *options, const BcApiBase *base) {
  return register_ops(options, base);
}
#endif
