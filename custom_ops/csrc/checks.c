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
    if (k->constant >> i & 1) {
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
  const Device *d = k->device;
  const int64_t packed[] = {bc_ceil_div(N, d->tile_rows), bc_ceil_div(K, d->tile_columns),
                            d->tile_bytes};
  const int64_t scales[] = {N, 1}, grouped[] = {packed[0], bc_groups(k, K), d->tile_rows};
  TRY(bc_expect(k, what, w, 3, packed));
  if (k->group_size) return bc_expect(k, scale_name, scale, 3, grouped);
  return bc_expect(k, scale_name, scale, 2, scales);
}

BcStatus *bc_optional(const Kernel *k, const char *what, const Tensor *t, size_t rank,
                      const int64_t *dim, const float **out) {
  *out = NULL;
  if (t->rank == 0) {
    if (*(const float *)t->data == 0.0f) return NULL;
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
