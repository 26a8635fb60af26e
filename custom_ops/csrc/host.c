#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* clock_gettime */
#endif
#include "host.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct BcStatus {
  char text[600];
};

struct BcInfo {
  const HostNode *node;
};

struct BcContext {
  const BcValue *in;
  size_t inputs;
  BcValue *out;
};

static char message[600];

static const char *say(const char *format, const char *what) {
  snprintf(message, sizeof message, format, what);
  return message;
}

double bc_host_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

size_t bc_host_bytes(const BcValue *value) {
  size_t count = value->type == BC_UINT8 ? 1 : 4;
  for (size_t i = 0; i < value->rank; i++) count *= (size_t)value->dim[i];
  return count;
}

/* ---- threads --------------------------------------------------------------------------------- */

/* One job at a time, its tasks taken one by one; idle threads sleep, as is advised on phones. A
 * lock and no atomic: those are functions of a compiler's library on some systems. */
static struct {
  pthread_mutex_t lock;
  pthread_cond_t begin, end;
  int helpers, working;
  unsigned job;
  void (*task)(void *, size_t);
  void *data;
  size_t next, count;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER,
          .begin = PTHREAD_COND_INITIALIZER,
          .end = PTHREAD_COND_INITIALIZER};

/* Runs tasks until none is left; the lock is held before and after. */
static void work(void) {
  while (pool.next < pool.count) {
    size_t i = pool.next++;
    pthread_mutex_unlock(&pool.lock);
    pool.task(pool.data, i);
    pthread_mutex_lock(&pool.lock);
  }
}

static void *help(void *unused) {
  unsigned seen = 0;
  pthread_mutex_lock(&pool.lock);
  for (;;) {
    while (pool.job == seen) pthread_cond_wait(&pool.begin, &pool.lock);
    seen = pool.job;
    pool.working++;
    work();
    if (!--pool.working) pthread_cond_broadcast(&pool.end);
  }
  return unused;
}

const char *bc_host_threads(int count) {
  for (; pool.helpers < count - 1 && pool.helpers < HOST_THREADS - 1; pool.helpers++) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, help, NULL)) return say("%s", "cannot start a thread");
  }
  return NULL;
}

static BcStatus *BC_CALL parallel_for(const BcContext *context, void (*task)(void *, size_t),
                                      size_t count, size_t batches, void *data) {
  (void)context, (void)batches;
  pthread_mutex_lock(&pool.lock);
  pool.task = task, pool.data = data, pool.next = 0, pool.count = count;
  pool.job++;
  pthread_cond_broadcast(&pool.begin);
  work();
  while (pool.working) pthread_cond_wait(&pool.end, &pool.lock);
  pthread_mutex_unlock(&pool.lock);
  return NULL;
}

/* ---- the API --------------------------------------------------------------------------------- */

static BcStatus *BC_CALL create_status(int code, const char *text) {
  BcStatus *status = calloc(1, sizeof *status);
  (void)code;
  if (status) snprintf(status->text, sizeof status->text, "%s", text);
  return status;
}

static void BC_CALL release_status(BcStatus *status) { free(status); }

static const char *check(BcStatus *status) {
  if (!status) return NULL;
  say("%s", status->text);
  free(status);
  return message;
}

static Host *registering; /* one at a time */

static BcStatus *BC_CALL create_domain(const char *name, BcDomain **out) {
  (void)name;
  *out = (BcDomain *)registering;
  return NULL;
}

static BcStatus *BC_CALL add_op(BcDomain *domain, const struct BcOp *op) {
  Host *host = (Host *)domain;
  if (host->ops == HOST_OPS) return create_status(BC_FAIL, "the plugin has too many operators");
  host->op[host->ops++] = op;
  return NULL;
}

static BcStatus *BC_CALL add_domain(BcOptions *options, BcDomain *domain) {
  (void)options, (void)domain;
  return NULL;
}

static const char *attribute(const BcInfo *info, const char *name) {
  for (size_t i = 0; i < info->node->attributes; i++)
    if (!strcmp(info->node->attribute[i].name, name)) return info->node->attribute[i].value;
  return NULL;
}

/* A number is what reads as one to its end. */
static BcStatus *BC_CALL attribute_int(const BcInfo *info, const char *name, int64_t *out) {
  const char *text = attribute(info, name);
  char *end = NULL;
  int64_t value = text ? strtoll(text, &end, 10) : 0;
  if (!text || *end || end == text) return create_status(BC_FAIL, "no such integer attribute");
  *out = value;
  return NULL;
}

static BcStatus *BC_CALL attribute_float(const BcInfo *info, const char *name, float *out) {
  const char *text = attribute(info, name);
  char *end = NULL;
  double value = text ? strtod(text, &end) : 0;
  if (!text || *end || end == text) return create_status(BC_FAIL, "no such float attribute");
  *out = (float)value;
  return NULL;
}

static BcStatus *BC_CALL attribute_string(const BcInfo *info, const char *name, char *out,
                                          size_t *size) {
  const char *text = attribute(info, name);
  if (!text || strlen(text) >= *size) return create_status(BC_FAIL, "no such string attribute");
  memcpy(out, text, strlen(text) + 1);
  return NULL;
}

static BcStatus *BC_CALL constant_input(const BcInfo *info, size_t i, int *constant,
                                        const BcValue **out) {
  const HostInput *input = &info->node->input[i];
  *constant = i < info->node->inputs && !input->varies;
  *out = *constant ? &input->tensor : NULL;
  return NULL;
}

static BcStatus *BC_CALL get_input(const BcContext *context, size_t i, const BcValue **out) {
  *out = i < context->inputs ? &context->in[i] : NULL;
  return NULL;
}

static BcStatus *BC_CALL get_output(BcContext *context, size_t i, const int64_t *dim, size_t rank,
                                    BcValue **out) {
  BcValue *value = context->out;
  (void)i;
  value->type = BC_FLOAT;
  value->rank = rank;
  memcpy(value->dim, dim, rank * sizeof *dim);
  *out = value;
  return bc_host_bytes(value) > value->room ? create_status(BC_FAIL, "an output has no room")
                                            : NULL;
}

/* A tensor is its own shape. */
static BcStatus *BC_CALL shape_of(const BcValue *value, BcShape **out) {
  *out = (BcShape *)value;
  return NULL;
}

static void BC_CALL keep_shape(BcShape *shape) { (void)shape; }

static BcStatus *BC_CALL count_dimensions(const BcShape *shape, size_t *out) {
  *out = ((const BcValue *)shape)->rank;
  return NULL;
}

static BcStatus *BC_CALL get_dimensions(const BcShape *shape, int64_t *out, size_t count) {
  memcpy(out, ((const BcValue *)shape)->dim, count * sizeof *out);
  return NULL;
}

static BcStatus *BC_CALL data_of(BcValue *value, void **out) {
  *out = value->data;
  return NULL;
}

static BcStatus *BC_CALL cpu_memory(int allocator, int type, BcMemoryInfo **out) {
  (void)allocator, (void)type;
  *out = NULL;
  return NULL;
}

static void BC_CALL keep_memory(BcMemoryInfo *memory) { (void)memory; }

static void *BC_CALL allocate(BcAllocator *allocator, size_t bytes) {
  (void)allocator;
  return malloc(bytes);
}

static void BC_CALL release(BcAllocator *allocator, void *block) {
  (void)allocator;
  free(block);
}

static BcStatus *BC_CALL get_allocator(const BcContext *context, const BcMemoryInfo *memory,
                                       BcAllocator **out) {
  static BcAllocator allocator = {.version = BC_ORT_API, .Alloc = allocate, .Free = release};
  (void)context, (void)memory;
  *out = &allocator;
  return NULL;
}

static void BC_CALL keep_allocator(BcAllocator *allocator) { (void)allocator; }

enum { SLOTS = 320 };
static void *table[SLOTS];

static const BcApi *BC_CALL get_api(uint32_t version) {
  return version <= BC_ORT_API ? (const BcApi *)table : NULL;
}

static const char *BC_CALL get_version(void) { return "bitcompile's own host"; }

/* X(name of the API, our function): what a plugin for CPUs calls. */
#define HOST_TABLE(X)                                  \
  X(CreateStatus, create_status)                       \
  X(ReleaseStatus, release_status)                     \
  X(CreateCustomOpDomain, create_domain)               \
  X(CustomOpDomain_Add, add_op)                        \
  X(AddCustomOpDomain, add_domain)                     \
  X(KernelInfoGetAttribute_int64, attribute_int)       \
  X(KernelInfoGetAttribute_float, attribute_float)     \
  X(KernelInfoGetAttribute_string, attribute_string)   \
  X(KernelInfoGetConstantInput_tensor, constant_input) \
  X(KernelContext_GetInput, get_input)                 \
  X(KernelContext_GetOutput, get_output)               \
  X(KernelContext_GetAllocator, get_allocator)         \
  X(KernelContext_ParallelFor, parallel_for)           \
  X(GetTensorTypeAndShape, shape_of)                   \
  X(ReleaseTensorTypeAndShapeInfo, keep_shape)         \
  X(GetDimensionsCount, count_dimensions)              \
  X(GetDimensions, get_dimensions)                     \
  X(GetTensorMutableData, data_of)                     \
  X(CreateCpuMemoryInfo, cpu_memory)                   \
  X(ReleaseMemoryInfo, keep_memory)                    \
  X(ReleaseAllocator, keep_allocator)

enum {
#define HOST_SLOT(name, slot, result, parameters) SLOT_##name = slot,
  BC_API_TABLE(HOST_SLOT)
};

/* The assignment to a pointer of the slot's type is what checks the function's. */
#define HOST_SET(name, function)                           \
  {                                                        \
    bc_fn_##name pointer = function;                       \
    memcpy(&table[SLOT_##name], &pointer, sizeof pointer); \
  }

/* ---- nodes ----------------------------------------------------------------------------------- */

const char *bc_host_open(Host *host, const char *library) {
  static const BcApiBase base = {get_api, get_version};
  BcStatus *(*entry)(BcOptions *, const BcApiBase *) = NULL;
  HOST_TABLE(HOST_SET)
  void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) return say("cannot load %s: is it built for this machine?", library);
  void *symbol = dlsym(handle, "RegisterCustomOps");
  if (!symbol) return say("%s is not a bitcompile plugin", library);
  memcpy(&entry, &symbol, sizeof entry);
  memset(host, 0, sizeof *host);
  registering = host;
  return check(entry(NULL, &base));
}

static const struct BcOp *find(const Host *host, const char *name) {
  for (size_t i = 0; i < host->ops; i++)
    if (!strcmp(host->op[i]->GetName(host->op[i]), name)) return host->op[i];
  return NULL;
}

/* The next word of the line; 0 at its end. */
static size_t next_word(const char **line, const char **word) {
  while (**line == ' ') ++*line;
  *word = *line;
  while (**line > ' ') ++*line;
  return (size_t)(*line - *word);
}

static int copy(char *to, size_t room, const char *from, size_t length) {
  if (length >= room) return 0;
  memcpy(to, from, length);
  to[length] = 0;
  return 1;
}

static int read_attribute(const char *word, size_t length, HostNode *out) {
  const char *equals = word;
  while (equals < word + length && *equals != '=') equals++;
  size_t name = (size_t)(equals - word);
  if (name == length || out->attributes == HOST_ATTRIBUTES) return 0;
  size_t i = out->attributes++;
  return copy(out->attribute[i].name, HOST_NAME, word, name) &&
         copy(out->attribute[i].value, HOST_NAME, equals + 1, length - name - 1);
}

static int read_input(const char *word, size_t length, HostNode *out) {
  const char *end = word + length;
  if (out->inputs == MAX_INPUTS) return 0;
  HostInput *input = &out->input[out->inputs++];
  BcValue *tensor = &input->tensor;
  input->varies = *word == '*';
  word += input->varies;
  tensor->type = *word == 'u' ? BC_UINT8 : BC_FLOAT;
  while (word < end && *word != ':') word++;
  if (word++ == end) return 0;
  while (word < end) {
    char *after = NULL;
    if (tensor->rank == MAX_RANK) return 0;
    int64_t size = *word == 'M' ? ANY_ROWS : strtoll(word, &after, 10);
    if (*word == 'M') after = (char *)word + 1;
    if (after == word) return 0;
    tensor->dim[tensor->rank++] = size;
    word = *after == 'x' ? after + 1 : after;
  }
  return 1;
}

const char *bc_host_read_node(const char *line, HostNode *out) {
  const char *word, *whole = line;
  int inputs = 0;
  memset(out, 0, sizeof *out);
  size_t length = next_word(&line, &word);
  int good = length && copy(out->op, HOST_NAME, word, length);
  while (good && (length = next_word(&line, &word))) {
    if (*word == '|')
      inputs = 1;
    else
      good = inputs ? read_input(word, length, out) : read_attribute(word, length, out);
  }
  return good && out->inputs ? NULL : say("not a node: %s", whole);
}

const char *bc_host_create(const Host *host, const HostNode *node, void **kernel) {
  const struct BcOp *op = find(host, node->op);
  BcInfo info = {node};
  if (!op) return say("the plugin has no operator %s", node->op);
  return check(op->CreateKernelV2(op, (const BcApi *)table, &info, kernel));
}

const char *bc_host_compute(const Host *host, const HostNode *node, void *kernel, const BcValue *in,
                            BcValue *out) {
  BcContext context = {in, node->inputs, out};
  return check(find(host, node->op)->KernelComputeV2(kernel, &context));
}

void bc_host_destroy(const Host *host, const HostNode *node, void *kernel) {
  find(host, node->op)->KernelDestroy(kernel);
}
