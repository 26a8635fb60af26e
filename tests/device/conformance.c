/* Golden vectors on a device: conformance LIBRARY VECTORS VARIANT...
 *
 * Every node of the file that tests/device/vectors.py wrote is computed by each variant of the
 * plugin (a value of BITCOMPILE_ISA), and must equal the reference to the bit, NaN being NaN. It
 * prints a table, and exits with 1 if a value differs, with 2 if something could not be run. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* setenv */
#endif
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host.h"

enum { LINE = 2048, CASES = 64, PAGE = 16384 };

typedef struct Case {
  char name[64];
  HostNode node;
  float *expected;
  int64_t count;
} Case;

static Case cases[CASES];
static int case_count;

static int die(const char *text, const char *what) {
  fprintf(stderr, "error: %s%s\n", text, what);
  exit(2);
}

static void *room(size_t bytes) {
  void *block = NULL;
  if (posix_memalign(&block, PAGE, bytes + PAGE)) die("out of memory", "");
  return block;
}

static void take(FILE *file, void *to, size_t bytes) {
  if (fread(to, 1, bytes, file) != bytes) die("the vectors end inside a case", "");
}

static int take_line(FILE *file, char *line) {
  int length = 0, c;
  while ((c = fgetc(file)) != EOF && c != '\n' && length < LINE - 1) line[length++] = (char)c;
  line[length] = 0;
  return length > 0;
}

static void read_cases(const char *path) {
  static char line[LINE];
  FILE *file = fopen(path, "rb");
  if (!file) die("cannot read ", path);
  while (take_line(file, line)) {
    if (case_count == CASES) die("too many cases in ", path);
    Case *c = &cases[case_count++];
    char *node = strchr(line, '\t');
    if (!node || node - line >= (int)sizeof c->name) die("not a case: ", line);
    memcpy(c->name, line, (size_t)(node - line));
    const char *failure = bc_host_read_node(node + 1, &c->node);
    if (failure) die(failure, "");
    for (size_t i = 0; i < c->node.inputs; i++) {
      BcValue *tensor = &c->node.input[i].tensor;
      tensor->data = room(bc_host_bytes(tensor));
      take(file, tensor->data, bc_host_bytes(tensor));
    }
    take(file, &c->count, sizeof c->count);
    c->expected = room((size_t)c->count * 4);
    take(file, c->expected, (size_t)c->count * 4);
  }
  fclose(file);
}

/* Values that are not the reference's; -1 with a message if the node does not run. */
static int64_t differences(const Host *host, const Case *c) {
  BcValue in[MAX_INPUTS], out = {.room = (size_t)c->count * 4};
  void *kernel = NULL;
  int64_t wrong = 0;
  out.data = room(out.room);
  memset(out.data, 0x7f, out.room);
  for (size_t i = 0; i < c->node.inputs; i++) in[i] = c->node.input[i].tensor;
  const char *failure = bc_host_create(host, &c->node, &kernel);
  if (!failure) failure = bc_host_compute(host, &c->node, kernel, in, &out);
  if (failure) fprintf(stderr, "%s: %s\n", c->name, failure);
  const float *y = out.data;
  for (int64_t i = 0; i < c->count; i++)
    wrong +=
        memcmp(&y[i], &c->expected[i], 4) && !(y[i] != y[i] && c->expected[i] != c->expected[i]);
  if (kernel) bc_host_destroy(host, &c->node, kernel);
  free(out.data);
  return failure ? -1 : wrong;
}

static int run(const char *library, const char *variant) {
  Host host;
  int64_t values = 0, wrong = 0;
  int worst = 0;
  setenv("BITCOMPILE_ISA", variant, 1);
  const char *failure = bc_host_open(&host, library);
  if (failure) return printf("| %s | not run: %s | | |\n", variant, failure) < 0 ? 2 : 0;
  for (int i = 0; i < case_count; i++) {
    int64_t found = differences(&host, &cases[i]);
    if (found > 0) fprintf(stderr, "%s: %lld values differ\n", cases[i].name, (long long)found);
    if (found) worst = found < 0 ? 2 : worst > 1 ? worst : 1;
    wrong += found > 0 ? found : 0;
    values += cases[i].count;
  }
  printf("| %s | %s | %lld | %lld |\n", variant, worst ? "FAILED" : "exact", (long long)values,
         (long long)wrong);
  return worst;
}

int main(int count, char **argument) {
  int worst = 0;
  if (count < 4) die("usage: conformance LIBRARY VECTORS VARIANT...", "");
  read_cases(argument[2]);
  bc_host_threads(4);
  printf("| variant | result | values | differ |\n|---|---|---|---|\n");
  for (int i = 3; i < count; i++) {
    int found = run(argument[1], argument[i]);
    worst = found > worst ? found : worst;
  }
  return worst;
}
