/* Reading and checking the tensors of a call. */
#include <stdarg.h>
#include <stdio.h>

#include "ops.h"

BcStatus *bc_fail(const BcApi *api, int code, const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return ort_CreateStatus(api)(code, text);
}

int64_t bc_elements(const Tensor *t) {
  int64_t n = 1;
  for (size_t i = 0; i < t->rank; i++) n *= t->dim[i];
  return n;
}

BcStatus *bc_parse_tensor(const Kernel *k, size_t index, const BcValue *value, Tensor *out) {
  const BcApi *api = k->api;
  BcShape *shape = NULL;
  void *data = NULL;
  if (!value)
    return bc_fail(api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: input %zu is missing; absent inputs are "
                   "rank-0 zeros",
                   k->spec->name, index);
  TRY(ort_GetTensorTypeAndShape(api)(value, &shape));
  BcStatus *status = ort_GetDimensionsCount(api)(shape, &out->rank);
  if (!status && out->rank > MAX_RANK)
    status = bc_fail(api, BC_INVALID_ARGUMENT,
                     "bitcompile::%s: input %zu has rank %zu; at most %d is "
                     "supported",
                     k->spec->name, index, out->rank, MAX_RANK);
  if (!status) status = ort_GetDimensions(api)(shape, out->dim, out->rank);
  ort_ReleaseTensorTypeAndShapeInfo(api)(shape);
  if (status) return status;
  TRY(ort_GetTensorMutableData(api)((BcValue *)value, &data));
  out->data = data;
  return NULL;
}

BcStatus *bc_read_inputs(const Kernel *k, BcContext *context, Tensor *in) {
  for (size_t i = 0; i < k->spec->inputs; i++) {
    const BcValue *value = NULL;
    if (!k->device->remote && k->constant >> i & 1) {
      in[i] = k->fixed[i];
      continue;
    }
    TRY(ort_KernelContext_GetInput(k->api)(context, i, &value));
    TRY(bc_parse_tensor(k, i, value, &in[i]));
  }
  return NULL;
}

BcStatus *bc_expect(const Kernel *k, const char *what, const Tensor *t, size_t rank,
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
  return bc_fail(k->api, BC_INVALID_ARGUMENT,
                 "bitcompile::%s: %s has shape [%s], expected [%s]; build "
                 "the model again or fix its input",
                 k->spec->name, what, got, want);
}

int64_t bc_groups(const Kernel *k, int64_t K) {
  return k->group_size ? bc_ceil_div(K, k->group_size) : 1;
}

BcStatus *bc_expect_weight(const Kernel *k, const char *what, const Tensor *w,
                           const char *scale_name, const Tensor *scale, int64_t N, int64_t K) {
  const Layout *l = k->layout;
  const int64_t packed[] = {bc_ceil_div(N, l->tile_rows), bc_ceil_div(K, l->tile_columns),
                            l->tile_bytes};
  const int64_t scales[] = {N, 1}, grouped[] = {packed[0], bc_groups(k, K), l->tile_rows};
  TRY(bc_expect(k, what, w, 3, packed));
  if (k->group_size) return bc_expect(k, scale_name, scale, 3, grouped);
  return bc_expect(k, scale_name, scale, 2, scales);
}

BcStatus *bc_optional(const Kernel *k, const char *what, const Tensor *t, size_t rank,
                      const int64_t *dim, const void **out) {
  *out = NULL;
  if (t->rank == 0) {
    if (k->device->remote || *(const float *)t->data == 0.0f) return NULL;
    return bc_fail(k->api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: %s is a scalar other than 0; give its "
                   "full shape, or a scalar 0 for none",
                   k->spec->name, what);
  }
  TRY(bc_expect(k, what, t, rank, dim));
  *out = t->data;
  return NULL;
}

BcStatus *bc_open_rows(const Kernel *k, BcContext *context, const Tensor *x, int64_t K, int64_t N,
                       Tensor *y, int64_t *M) {
  BcValue *value = NULL;
  void *data = NULL;
  if (x->rank < 1 || x->dim[x->rank - 1] != K)
    return bc_fail(k->api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: the last dimension of x is %lld; the "
                   "weights have K = %lld columns",
                   k->spec->name, (long long)(x->rank ? x->dim[x->rank - 1] : 0), (long long)K);
  *y = *x;
  y->dim[y->rank - 1] = N;
  *M = bc_elements(x) / K;
  TRY(ort_KernelContext_GetOutput(k->api)(context, 0, y->dim, y->rank, &value));
  TRY(ort_GetTensorMutableData(k->api)(value, &data));
  y->data = data;
  if (*M > INT32_MAX / 16)
    return bc_fail(k->api, BC_INVALID_ARGUMENT,
                   "bitcompile::%s: %lld rows in one call; at most %d are "
                   "supported: split the batch",
                   k->spec->name, (long long)*M, INT32_MAX / 16);
  return NULL;
}

/* BitLinear(x, w, w_scale, bias, residual), NormBitLinear(x, gamma, w, w_scale, bias, residual) */
static BcStatus *check_linear(const Kernel *k, const Tensor *in) {
  size_t w = bc_weight_index(k);
  int64_t gamma_shape[] = {k->K};
  TRY(bc_expect_weight(k, "w", &in[w], "w_scale", &in[w + 1], k->N, k->K));
  return w == 2 ? bc_expect(k, "gamma", &in[1], 1, gamma_shape) : NULL;
}

/* BitGLU(x, gamma_in, w_gate_up, s_gate_up, gamma_sub, w_down, s_down, residual) */
static BcStatus *check_glu(const Kernel *k, const Tensor *in) {
  int64_t in_shape[] = {k->K}, sub_shape[] = {k->F};
  TRY(bc_expect(k, "gamma_in", &in[1], 1, in_shape));
  TRY(bc_expect_weight(k, "w_gate_up", &in[2], "s_gate_up", &in[3], 2 * k->F, k->K));
  if (k->sub_norm) TRY(bc_expect(k, "gamma_sub", &in[4], 1, sub_shape));
  return bc_expect_weight(k, "w_down", &in[5], "s_down", &in[6], k->N, k->F);
}

/* HeadLinear(x, table, scale) */
static BcStatus *check_head(const Kernel *k, const Tensor *in) {
  int64_t B = bc_ceil_div(k->K, k->block);
  const int64_t table_shape[] = {k->N, B, k->block * k->bits / 8}, scale_shape[] = {k->N, B, 1};
  TRY(bc_expect(k, "table", &in[1], 3, table_shape));
  return bc_expect(k, "scale", &in[2], 3, scale_shape);
}

BcStatus *bc_open_node(const Kernel *k, BcContext *context, Node *out) {
  static BcStatus *(*const checks[])(const Kernel *, const Tensor *) = {check_linear, check_linear,
                                                                        check_glu, check_head};
  int linear = k->op == BC_BIT_LINEAR || k->op == BC_NORM_BIT_LINEAR;
  int64_t bias_shape[] = {k->N};
  const Tensor *last = &out->in[k->spec->inputs - 1];
  out->bias = out->residual = NULL;
  TRY(bc_read_inputs(k, context, out->in));
  TRY(checks[k->op](k, out->in));
  TRY(bc_open_rows(k, context, &out->in[0], k->K, k->N, &out->y, &out->M));
  if (linear) TRY(bc_optional(k, "bias", last - 1, 1, bias_shape, (const void **)&out->bias));
  if (k->op == BC_HEAD_LINEAR) return NULL;
  return bc_optional(k, "residual", last, out->y.rank, out->y.dim, (const void **)&out->residual);
}
