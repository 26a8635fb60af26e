/* Stands in for host.c: a CPU and a GPU whose times the test gives, in microseconds a node, as
 * FAKE_TIMES="cpu_token gpu_token cpu_prompt gpu_prompt". FAKE_WRONG lets the GPU compute 2. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "host.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double now;
static const Host *hosts[2];
static int opened;

const char *bc_host_threads(int count) { return (void)count, NULL; }

const char *bc_host_open(Host *host, const char *library) {
  (void)library;
  hosts[opened++] = host;
  return NULL;
}

const char *bc_host_read_node(const char *line, HostNode *out) {
  memset(out, 0, sizeof *out);
  snprintf(out->op, sizeof out->op, "%s", line + 1);
  out->attributes = out->inputs = 1;
  snprintf(out->attribute[0].name, HOST_NAME, "N");
  snprintf(out->attribute[0].value, HOST_NAME, "4");
  out->input[0] = (HostInput){.varies = 1, .tensor = {.type = BC_FLOAT, .rank = 2}};
  out->input[0].tensor.dim[0] = ANY_ROWS;
  out->input[0].tensor.dim[1] = 4;
  return NULL;
}

const char *bc_host_create(const Host *host, const HostNode *node, void **kernel) {
  (void)host, (void)node;
  *kernel = &now;
  return NULL;
}

const char *bc_host_compute(const Host *host, const HostNode *node, void *kernel, const BcValue *in,
                            BcValue *out) {
  double times[2][2];
  int gpu = host == hosts[1], prompt = in[0].dim[0] > 1;
  (void)node, (void)kernel;
  sscanf(getenv("FAKE_TIMES"), "%lf %lf %lf %lf", &times[0][0], &times[0][1], &times[1][0],
         &times[1][1]);
  now += 1e-6 * times[prompt][gpu];
  for (size_t i = 0; i < out->room / 4; i++)
    ((float *)out->data)[i] = gpu && getenv("FAKE_WRONG") ? 2.0f : 1.0f;
  return NULL;
}

void bc_host_destroy(const Host *host, const HostNode *node, void *kernel) {
  (void)host, (void)node, (void)kernel;
}

size_t bc_host_bytes(const BcValue *value) {
  size_t count = 4;
  for (size_t i = 0; i < value->rank; i++) count *= (size_t)value->dim[i];
  return count;
}

double bc_host_seconds(void) { return now; }
