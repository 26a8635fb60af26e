#include "bitcompile_model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__has_include)
#if __has_include(<onnxruntime/onnxruntime_c_api.h>)
#include <onnxruntime/onnxruntime_c_api.h> /* iOS and macOS: inside onnxruntime.framework */
#else
#include <onnxruntime_c_api.h>
#endif
#else
#include <onnxruntime_c_api.h>
#endif

#ifdef BITCOMPILE_STATIC
#include "bitcompile.h"
#endif

enum { MINIMUM = 23, NAME = 64 };
/* ONNX Runtime 1.23. The table of its API only grows, so asking for the oldest that will do runs
 * on every newer one, whatever headers this file is compiled with. */

enum { TOKENS, MASK, CACHES }; /* inputs; the outputs are the logits and then the caches */

struct bcm_model {
  const OrtApi *api;
  OrtEnv *env;
  OrtSessionOptions *options;
  OrtSession *session;
  OrtMemoryInfo *memory;
  size_t caches, capacity, length, vocabulary, cache_bytes;
  int64_t heads, head_size;
  char (*inputs)[NAME], (*outputs)[NAME];
  const char **input_names, **output_names;
  OrtValue **feeds, **fetches;
  float **buffers;
  int64_t *ones;
};

static _Thread_local char message[1024];

static const char *fail(const char *text) {
  snprintf(message, sizeof message, "%s", text);
  return message;
}

static const char *check(const OrtApi *api, OrtStatus *status) {
  if (!status) return NULL;
  fail(api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  return message;
}

#define TRY(call)                \
  do {                           \
    const char *failed = (call); \
    if (failed) return failed;   \
  } while (0)
#define ORT(call) TRY(check(m->api, (call)))

static const char *register_plugin(bcm_model *m, const bcm_options *o) {
#ifdef BITCOMPILE_STATIC
  (void)o;
  ORT(bitcompile_RegisterCustomOps(m->options, OrtGetApiBase()));
#else
  char path[4096];
  if (o->library)
    snprintf(path, sizeof path, "%s", o->library);
  else
    snprintf(path, sizeof path, "%s/libbitcompile_ops.so", o->folder);
  ORT(m->api->RegisterCustomOpsLibrary_V2(m->options, path));
#endif
  return NULL;
}

static const char *make_session(bcm_model *m, const bcm_options *o) {
  char path[4096];
  ORT(m->api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "bitcompile", &m->env));
  ORT(m->api->CreateSessionOptions(&m->options));
  ORT(m->api->SetIntraOpNumThreads(m->options, o->threads));
  ORT(m->api->AddSessionConfigEntry(m->options, "session.intra_op.allow_spinning",
                                    o->spinning ? "1" : "0"));
  TRY(register_plugin(m, o));
  /* By path, so that the weights in model.onnx.data are mapped and never copied. */
  snprintf(path, sizeof path, "%s/model.onnx", o->folder);
  ORT(m->api->CreateSession(m->env, path, m->options, &m->session));
  ORT(m->api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &m->memory));
  return NULL;
}

/* Dimensions of an input or output whose type is `type`; releases it. */
static const char *dimensions(bcm_model *m, OrtTypeInfo *type, int64_t *dims, size_t rank) {
  const OrtTensorTypeAndShapeInfo *shape = NULL;
  size_t found = 0;
  const char *failure = check(m->api, m->api->CastTypeInfoToTensorInfo(type, &shape));
  if (!failure && shape) failure = check(m->api, m->api->GetDimensionsCount(shape, &found));
  if (!failure && found != rank) failure = fail("not a language model of `bitcompile build`");
  if (!failure) failure = check(m->api, m->api->GetDimensions(shape, dims, rank));
  m->api->ReleaseTypeInfo(type);
  return failure;
}

static const char *read_shapes(bcm_model *m) {
  OrtTypeInfo *type = NULL;
  size_t inputs = 0;
  int64_t cache[4], logits[3];
  ORT(m->api->SessionGetInputCount(m->session, &inputs));
  if (inputs <= CACHES) return fail("not a language model of `bitcompile build`");
  m->caches = inputs - CACHES;
  ORT(m->api->SessionGetInputTypeInfo(m->session, CACHES, &type));
  TRY(dimensions(m, type, cache, 4));
  ORT(m->api->SessionGetOutputTypeInfo(m->session, 0, &type));
  TRY(dimensions(m, type, logits, 3));
  m->heads = cache[1];
  m->head_size = cache[3];
  m->vocabulary = (size_t)logits[2];
  return NULL;
}

static const char *allocate(bcm_model *m) {
  size_t inputs = CACHES + m->caches, outputs = 1 + m->caches;
  m->inputs = calloc(inputs, NAME);
  m->outputs = calloc(outputs, NAME);
  m->input_names = calloc(inputs, sizeof *m->input_names);
  m->output_names = calloc(outputs, sizeof *m->output_names);
  m->feeds = calloc(inputs, sizeof *m->feeds);
  m->fetches = calloc(outputs, sizeof *m->fetches);
  m->buffers = calloc(m->caches, sizeof *m->buffers);
  m->ones = malloc(m->capacity * sizeof *m->ones);
  if (!m->inputs || !m->outputs || !m->input_names || !m->output_names || !m->feeds ||
      !m->fetches || !m->buffers || !m->ones)
    return fail("out of memory");
  for (size_t i = 0; i < m->capacity; i++) m->ones[i] = 1;
  return NULL;
}

static void name_tensors(bcm_model *m) {
  snprintf(m->inputs[TOKENS], NAME, "input_ids");
  snprintf(m->inputs[MASK], NAME, "attention_mask");
  snprintf(m->outputs[0], NAME, "logits");
  for (size_t i = 0; i < m->caches; i++) {
    const char *kind = i % 2 ? "value" : "key";
    snprintf(m->inputs[CACHES + i], NAME, "past_key_values.%zu.%s", i / 2, kind);
    snprintf(m->outputs[1 + i], NAME, "present.%zu.%s", i / 2, kind);
  }
  for (size_t i = 0; i < CACHES + m->caches; i++) m->input_names[i] = m->inputs[i];
  for (size_t i = 0; i < 1 + m->caches; i++) m->output_names[i] = m->outputs[i];
}

/* One value a cache, of full capacity, that is both past and present: attention sees that they are
 * one buffer and appends the new tokens in place. Otherwise it would copy the whole cache for
 * every token. */
static const char *make_caches(bcm_model *m) {
  const int64_t shape[4] = {1, m->heads, (int64_t)m->capacity, m->head_size};
  size_t bytes = sizeof(float) * (size_t)(m->heads * m->head_size) * m->capacity;
  for (size_t i = 0; i < m->caches; i++) {
    m->buffers[i] = calloc(1, bytes); /* pages are taken as tokens reach them */
    if (!m->buffers[i]) return fail("out of memory: choose a smaller capacity");
    ORT(m->api->CreateTensorWithDataAsOrtValue(m->memory, m->buffers[i], bytes, shape, 4,
                                               ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                               &m->feeds[CACHES + i]));
    m->fetches[1 + i] = m->feeds[CACHES + i];
  }
  m->cache_bytes = bytes * m->caches;
  return NULL;
}

static const char *start(bcm_model *m, const bcm_options *o) {
  if (!o->capacity) return fail("capacity is 0: give the most tokens the KV cache shall hold");
  m->capacity = o->capacity;
  TRY(make_session(m, o));
  TRY(read_shapes(m));
  TRY(allocate(m));
  name_tensors(m);
  return make_caches(m);
}

const char *bcm_open(const bcm_options *options, bcm_model **model) {
  *model = NULL;
  const OrtApi *api = OrtGetApiBase()->GetApi(MINIMUM);
  if (!api) return fail("onnxruntime is too old: bitcompile's models need 1.23 or newer");
  bcm_model *m = calloc(1, sizeof *m);
  if (!m) return fail("out of memory");
  m->api = api;
  const char *failure = start(m, options);
  if (failure)
    bcm_close(m);
  else
    *model = m;
  return failure;
}

static void drop(bcm_model *m, OrtValue **value) {
  if (*value) m->api->ReleaseValue(*value);
  *value = NULL;
}

static const char *int64_row(bcm_model *m, const int64_t *data, size_t count, OrtValue **value) {
  const int64_t shape[2] = {1, (int64_t)count};
  drop(m, value);
  ORT(m->api->CreateTensorWithDataAsOrtValue(m->memory, (void *)data, count * sizeof *data, shape,
                                             2, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, value));
  return NULL;
}

/* The last row of the logits: a model built with `--logits all` gives one a token. */
static const char *last_row(bcm_model *m, const float **logits) {
  OrtTensorTypeAndShapeInfo *shape = NULL;
  size_t elements = 0;
  float *data = NULL;
  ORT(m->api->GetTensorTypeAndShape(m->fetches[0], &shape));
  const char *failure = check(m->api, m->api->GetTensorShapeElementCount(shape, &elements));
  m->api->ReleaseTensorTypeAndShapeInfo(shape);
  TRY(failure);
  ORT(m->api->GetTensorMutableData(m->fetches[0], (void **)&data));
  *logits = data + elements - m->vocabulary;
  return NULL;
}

const char *bcm_feed(bcm_model *m, const int64_t *tokens, size_t count, const float **logits) {
  if (!count) return fail("no tokens: feed at least one");
  if (count > m->capacity - m->length)
    return fail("the KV cache is full: open the model with a larger capacity, or rewind it");
  for (size_t i = 0; i < count; i++) /* onnxruntime does not check them */
    if (tokens[i] < 0 || (size_t)tokens[i] >= m->vocabulary)
      return fail("a token is not in the vocabulary: is the tokenizer this model's?");
  TRY(int64_row(m, tokens, count, &m->feeds[TOKENS]));
  TRY(int64_row(m, m->ones, m->length + count, &m->feeds[MASK]));
  drop(m, &m->fetches[0]); /* onnxruntime allocates the logits */
  ORT(m->api->Run(m->session, NULL, m->input_names, (const OrtValue *const *)m->feeds,
                  CACHES + m->caches, m->output_names, 1 + m->caches, m->fetches));
  m->length += count;
  return last_row(m, logits);
}

size_t bcm_vocabulary(const bcm_model *m) { return m->vocabulary; }

size_t bcm_cache_bytes(const bcm_model *m) { return m->cache_bytes; }

size_t bcm_length(const bcm_model *m) { return m->length; }

void bcm_rewind(bcm_model *m, size_t length) {
  if (length < m->length) m->length = length;
}

int64_t bcm_argmax(const float *logits, size_t count) {
  size_t best = 0;
  for (size_t i = 1; i < count; i++)
    if (logits[i] > logits[best]) best = i;
  return (int64_t)best;
}

void bcm_close(bcm_model *m) {
  if (!m) return;
  if (m->fetches) drop(m, &m->fetches[0]);
  for (size_t i = 0; m->feeds && i < CACHES + m->caches; i++) drop(m, &m->feeds[i]);
  for (size_t i = 0; m->buffers && i < m->caches; i++) free(m->buffers[i]);
  if (m->memory) m->api->ReleaseMemoryInfo(m->memory);
  if (m->session) m->api->ReleaseSession(m->session);
  if (m->options) m->api->ReleaseSessionOptions(m->options);
  if (m->env) m->api->ReleaseEnv(m->env);
  free(m->ones);
  free(m->buffers);
  free(m->fetches);
  free(m->feeds);
  free(m->output_names);
  free(m->input_names);
  free(m->outputs);
  free(m->inputs);
  free(m);
}
