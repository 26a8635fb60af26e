/* As much of ONNX Runtime as a plugin calls, to run single nodes on a device where neither Python
 * nor ONNX Runtime's library has to be: for programs, never part of a plugin. */
#ifndef BITCOMPILE_HOST_H
#define BITCOMPILE_HOST_H

#include "ops.h"

enum { HOST_OPS = 16, HOST_ATTRIBUTES = 16, HOST_NAME = 32, HOST_THREADS = 16 };
enum { ANY_ROWS = -1 }; /* a dimension that a call chooses, written M */

struct BcValue { /* a tensor */
  int type;
  size_t rank;
  int64_t dim[MAX_RANK];
  void *data;
  size_t room; /* bytes at data, of an output */
};

typedef struct HostInput {
  BcValue tensor; /* its data is the caller's */
  int varies;     /* given to each call, the others are the node's constants */
} HostInput;

/* A node, read from a line such as
 *   BitLinear K=203 N=37 layout=... | *f32:Mx203 u8:3x13x64 f32:37x1 f32: f32:
 * with attributes before the bar and inputs after it, those that vary with a star. */
typedef struct HostNode {
  char op[HOST_NAME];
  size_t attributes, inputs;
  struct {
    char name[HOST_NAME], value[HOST_NAME];
  } attribute[HOST_ATTRIBUTES];
  HostInput input[MAX_INPUTS];
} HostNode;

typedef struct Host { /* a registration of a plugin */
  const struct BcOp *op[HOST_OPS];
  size_t ops;
} Host;

/* Each returns NULL, or a message that stays valid until the next call. */

/* The threads that nodes run on, the caller's included. Once. */
const char *bc_host_threads(int count);
/* Loads a plugin, which reads the environment now. */
const char *bc_host_open(Host *host, const char *library);
const char *bc_host_read_node(const char *line, HostNode *out);
/* A kernel of the node, whose constants must outlive it. */
const char *bc_host_create(const Host *host, const HostNode *node, void **kernel);
/* `in`: one for each of the node's inputs. */
const char *bc_host_compute(const Host *host, const HostNode *node, void *kernel, const BcValue *in,
                            BcValue *out);
void bc_host_destroy(const Host *host, const HostNode *node, void *kernel);

size_t bc_host_bytes(const BcValue *value);
double bc_host_seconds(void);

#endif
