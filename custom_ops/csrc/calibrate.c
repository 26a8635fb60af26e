/* Which calls are faster on the GPU of this device: calibrate [options] ARTIFACT
 *
 * Every kind of node in the artifact (calibrate.txt) runs with weights of its size on the CPU and
 * on the GPU, for one token and for a prompt. The choice goes to LIBRARY.offload, which the plugin
 * reads when it is loaded. Nothing but the plugin is needed beside this program. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* setenv */
#endif
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host.h"

enum { LINE = 2048, PATH = 1024, KINDS = 64, PAGE = 16384, REPEATS = 5, TEXT = 1 << 14 };
enum { MOST_COPIES = 64, MOST_BYTES = 64 << 20 }; /* weights of a kind, more than caches hold */
enum { CPU, GPU, PLACES };
enum { DECODE, PREFILL, PHASES };

static const char USAGE[] =
    "usage: calibrate [-t THREADS] [-p PROMPT] [-n TOKENS] [-s SECONDS] [-o FILE] ARTIFACT\n"
    "  -t  threads of the CPU's kernels, as many as the app gives ONNX Runtime (4)\n"
    "  -p  tokens of a prompt (256)          -n  tokens of an answer (128)\n"
    "  -s  seconds of a measurement (0.2)    -o  where the choice goes (LIBRARY.offload)\n";

typedef struct Kind { /* nodes of the graph that are alike */
  HostNode node;
  int64_t count;
  double seconds[PLACES][PHASES];
} Kind;

typedef struct Options {
  const char *artifact, *out;
  int threads, prompt, tokens;
  double seconds;
} Options;

static Kind kinds[KINDS];
static int kind_count;
static char target[HOST_NAME], library[PATH];

static int die(const char *text, const char *what) {
  fprintf(stderr, "error: %s%s\n", text, what);
  exit(2);
}

/* What is said, and what is kept behind the choice. */
static char report[TEXT];
static size_t report_length;

static void tell(const char *format, ...) {
  va_list arguments;
  size_t left = sizeof report - report_length;
  va_start(arguments, format);
  int length = vsnprintf(report + report_length, left, format, arguments);
  va_end(arguments);
  if (length > 0) report_length += (size_t)length < left ? (size_t)length : left - 1;
}

/* ---- what to measure ------------------------------------------------------------------------- */

static void read_line(char *line, const char *folder) {
  char *rest = NULL;
  size_t end = strlen(line);
  while (end && line[end - 1] <= ' ') line[--end] = 0;
  if (!strncmp(line, "target ", 7))
    snprintf(target, sizeof target, "%s", line + 7);
  else if (!strncmp(line, "library ", 8))
    snprintf(library, sizeof library, "%s/%s", folder, line + 8);
  else {
    if (kind_count == KINDS) die("too many kinds of nodes in ", folder);
    Kind *kind = &kinds[kind_count++];
    kind->count = strtoll(line, &rest, 10);
    const char *failure = bc_host_read_node(rest, &kind->node);
    if (failure) die(failure, "");
  }
}

static void read_kinds(const char *folder) {
  static char path[PATH], line[LINE];
  int length = 0, c;
  snprintf(path, sizeof path, "%s/calibrate.txt", folder);
  FILE *file = fopen(path, "rb");
  if (!file) die("not an artifact for OpenCL devices, for want of ", path);
  while ((c = fgetc(file)) != EOF) {
    if (c != '\n' && length < LINE - 1) {
      line[length++] = (char)c;
      continue;
    }
    line[length] = 0;
    length = 0;
    read_line(line, folder);
  }
  fclose(file);
  if (!target[0] || !library[0] || !kind_count) die("nothing to measure in ", path);
}

/* ---- tensors --------------------------------------------------------------------------------- */

static uint32_t random_bits(void) {
  static uint32_t state = 2463534242u; /* Marsaglia, Xorshift RNGs, 2003 */
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}

/* Codes 0 to 2 in bytes; floats from 1/2 to 3/2, of both signs where they are activations. */
static void fill(const BcValue *tensor, int signs) {
  size_t count = bc_host_bytes(tensor);
  uint8_t *codes = tensor->data;
  float *real = tensor->data;
  if (tensor->type != BC_UINT8) count /= 4;
  for (size_t i = 0; i < count; i++) {
    uint32_t bits = random_bits(), n = bits >> 16;
    float value = tensor->rank ? 0.5f + (float)(bits >> 8) * 0x1p-24f : 0;
    if (tensor->type == BC_UINT8)
      codes[i] = (uint8_t)(n % 3 | (n / 3 % 3) << 2 | (n / 9 % 3) << 4 | (n / 27 % 3) << 6);
    else
      real[i] = signs && bits & 1 ? -value : value;
  }
}

static void *room(size_t bytes) {
  void *block = NULL;
  if (posix_memalign(&block, PAGE, bytes + PAGE)) die("out of memory: choose a shorter prompt", "");
  return block;
}

/* The tensor of M rows. */
static BcValue of_rows(const BcValue *tensor, int64_t M) {
  BcValue value = *tensor;
  for (size_t i = 0; i < value.rank; i++)
    if (value.dim[i] == ANY_ROWS) value.dim[i] = M;
  return value;
}

static int64_t columns(const HostNode *node) {
  for (size_t i = 0; i < node->attributes; i++)
    if (!strcmp(node->attribute[i].name, "N")) return strtoll(node->attribute[i].value, NULL, 10);
  return 0;
}

static size_t constant_bytes(const HostNode *node) {
  size_t bytes = 0;
  for (size_t i = 0; i < node->inputs; i++)
    if (!node->input[i].varies) bytes += bc_host_bytes(&node->input[i].tensor);
  return bytes;
}

/* ---- measuring ------------------------------------------------------------------------------- */

typedef struct Bench { /* of a kind: as many copies as the graph has, as far as there is room */
  HostNode copy[MOST_COPIES];
  void *kernel[PLACES][MOST_COPIES];
  int copies;
  BcValue in[MAX_INPUTS], out[PLACES];
} Bench;

static int compute(const Host *host, Bench *b, int place, int copy) {
  HostNode *node = &b->copy[copy];
  for (size_t i = 0; i < node->inputs; i++)
    if (!node->input[i].varies) b->in[i] = node->input[i].tensor;
  const char *failure = bc_host_compute(host, node, b->kernel[place][copy], b->in, &b->out[place]);
  if (failure) fprintf(stderr, "%s\n", failure);
  return failure != NULL;
}

static void open_bench(Bench *b, const Kind *kind) {
  size_t bytes = constant_bytes(&kind->node);
  memset(b, 0, sizeof *b);
  b->copies = 1;
  while (b->copies < kind->count && b->copies < MOST_COPIES &&
         (size_t)(b->copies + 1) * bytes <= MOST_BYTES)
    b->copies++;
  for (int c = 0; c < b->copies; c++) {
    b->copy[c] = kind->node;
    for (size_t i = 0; i < kind->node.inputs; i++) {
      BcValue *tensor = &b->copy[c].input[i].tensor;
      if (b->copy[c].input[i].varies) continue;
      tensor->data = room(bc_host_bytes(tensor));
      fill(tensor, 0);
    }
  }
}

static void close_bench(const Host *hosts, Bench *b) {
  for (int c = 0; c < b->copies; c++) {
    for (int place = 0; place < PLACES; place++)
      if (b->kernel[place][c]) bc_host_destroy(&hosts[place], &b->copy[c], b->kernel[place][c]);
    for (size_t i = 0; i < b->copy[c].inputs; i++)
      if (!b->copy[c].input[i].varies) free(b->copy[c].input[i].tensor.data);
  }
}

static void open_call(Bench *b, const HostNode *node, int64_t M) {
  for (size_t i = 0; i < node->inputs; i++) {
    b->in[i] = of_rows(&node->input[i].tensor, M);
    if (!node->input[i].varies) continue;
    b->in[i].data = room(bc_host_bytes(&b->in[i]));
    fill(&b->in[i], 1);
  }
  for (int place = 0; place < PLACES; place++) {
    b->out[place].room = (size_t)(M * columns(node)) * 4;
    b->out[place].data = room(b->out[place].room);
  }
}

static void close_call(Bench *b, const HostNode *node) {
  for (size_t i = 0; i < node->inputs; i++)
    if (node->input[i].varies) free(b->in[i].data);
  for (int place = 0; place < PLACES; place++) free(b->out[place].data);
}

/* Seconds of a node at both places: the best of repeats in turn, over all copies. Returns 1 if a
 * node does not run, 2 if the results differ. */
static int measure(const Host *hosts, Bench *b, double budget, double *seconds) {
  for (int place = 0; place < PLACES; place++) {
    seconds[place] = 1e9;
    for (int c = 0; c < b->copies; c++) /* also brings all weights to where they are read */
      if (compute(&hosts[place], b, place, c)) return 1;
  }
  if (memcmp(b->out[CPU].data, b->out[GPU].data, b->out[CPU].room)) return 2;
  for (int repeat = 0; repeat < REPEATS; repeat++)
    for (int place = 0; place < PLACES; place++) {
      double begin = bc_host_seconds(), passed = 0;
      int64_t done = 0;
      while (passed < budget / REPEATS) {
        for (int c = 0; c < b->copies; c++, done++)
          if (compute(&hosts[place], b, place, c)) return 1;
        passed = bc_host_seconds() - begin;
      }
      if (passed / (double)done < seconds[place]) seconds[place] = passed / (double)done;
    }
  return 0;
}

static const char *measure_kind(const Host *hosts, Kind *kind, const Options *o) {
  static Bench bench;
  const char *failure = NULL;
  open_bench(&bench, kind);
  for (int place = 0; place < PLACES && !failure; place++)
    for (int c = 0; c < bench.copies && !failure; c++)
      failure = bc_host_create(&hosts[place], &bench.copy[c], &bench.kernel[place][c]);
  for (int phase = 0; phase < PHASES && !failure; phase++) {
    double seconds[PLACES] = {0};
    int64_t M = phase == DECODE ? 1 : o->prompt;
    open_call(&bench, &kind->node, M);
    int wrong = measure(hosts, &bench, o->seconds, seconds);
    close_call(&bench, &kind->node);
    if (wrong) failure = wrong == 1 ? "a node does not run" : "the GPU's results are not the CPU's";
    for (int place = 0; place < PLACES; place++) kind->seconds[place][phase] = seconds[place];
  }
  close_bench(hosts, &bench);
  return failure;
}

/* ---- the choice ------------------------------------------------------------------------------ */

/* A row for a kind: what it costs, and the rate at which its constants are read. */
static void tell_kind(const Kind *kind, const Options *o) {
  double bytes = (double)constant_bytes(&kind->node);
  for (int phase = 0; phase < PHASES; phase++) {
    double cpu = kind->seconds[CPU][phase], gpu = kind->seconds[GPU][phase];
    tell("| %s, N %lld | %lld | %d | %.1f | %.1f | %.2f | %.2f |\n", kind->node.op,
         (long long)columns(&kind->node), (long long)kind->count, phase == DECODE ? 1 : o->prompt,
         cpu * 1e6, gpu * 1e6, bytes / cpu * 1e-9, bytes / gpu * 1e-9);
  }
}

static double total(int place, int phase) {
  double seconds = 0;
  for (int i = 0; i < kind_count; i++)
    seconds += (double)kinds[i].count * kinds[i].seconds[place][phase];
  return seconds;
}

/* The choice that takes least for a prompt and an answer. More goes to the GPU only if that saves
 * three hundredths: what is measured is not that sure. */
static const char *choose(const Options *o) {
  const char *names[] = {"none", "prefill", "all"};
  double tokens = o->tokens, prompt = total(GPU, PREFILL), decode = total(CPU, DECODE);
  double cost[] = {total(CPU, PREFILL) + tokens * decode, prompt + tokens * decode,
                   prompt + tokens * total(GPU, DECODE)};
  int best = 0;
  tell("\n| all of these nodes | CPU ms | GPU ms |\n|---|---|---|\n");
  tell("| a token | %.3f | %.3f |\n", decode * 1e3, total(GPU, DECODE) * 1e3);
  tell("| a prompt of %d | %.3f | %.3f |\n", o->prompt, total(CPU, PREFILL) * 1e3, prompt * 1e3);
  for (int i = 1; i < 3; i++)
    if (cost[i] < 0.97 * cost[best]) best = i;
  return names[best];
}

static const char *calibrate(const Options *o) {
  static Host hosts[PLACES];
  const char *failure = bc_host_threads(o->threads);
  setenv("BITCOMPILE_OFFLOAD", "none", 1);
  if (!failure) failure = bc_host_open(&hosts[CPU], library);
  if (failure) die(failure, "");
  setenv("BITCOMPILE_ISA", target, 1); /* the device alone, or an error */
  failure = bc_host_open(&hosts[GPU], library);
  if (!failure) {
    tell("| node | of them | rows | CPU us | GPU us | CPU GB/s | GPU GB/s |\n");
    tell("|---|---|---|---|---|---|---|\n");
  }
  for (int i = 0; i < kind_count && !failure; i++) {
    failure = measure_kind(hosts, &kinds[i], o);
    if (!failure) tell_kind(&kinds[i], o);
  }
  if (!failure) return choose(o);
  tell("all on the CPU: %s\n", failure);
  return "none";
}

static double number(const char *text, double least, double most) {
  char *end = NULL;
  double value = text ? strtod(text, &end) : 0;
  if (!text || end == text || *end || value < least || value > most)
    die(text ? "not a number in range: " : USAGE, text ? text : "");
  return value;
}

static Options parse(int count, char **argument) {
  Options o = {.threads = 4, .prompt = 256, .tokens = 128, .seconds = 0.2};
  for (int i = 1; i < count; i++) {
    const char *word = argument[i], *value = i + 1 < count ? argument[i + 1] : NULL;
    if (word[0] != '-') {
      o.artifact = word;
      continue;
    }
    i++;
    if (!strcmp(word, "-t"))
      o.threads = (int)number(value, 1, HOST_THREADS);
    else if (!strcmp(word, "-p"))
      o.prompt = (int)number(value, 9, 4096); /* fewer rows count as decode */
    else if (!strcmp(word, "-n"))
      o.tokens = (int)number(value, 0, 1e6);
    else if (!strcmp(word, "-s"))
      o.seconds = number(value, 0, 60);
    else if (!strcmp(word, "-o") && value)
      o.out = value;
    else
      die(USAGE, "");
  }
  if (!o.artifact) die(USAGE, "");
  return o;
}

int main(int count, char **argument) {
  static char path[PATH + 16];
  Options o = parse(count, argument);
  read_kinds(o.artifact);
  const char *choice = calibrate(&o);
  snprintf(path, sizeof path, "%s.offload", library);
  if (o.out) snprintf(path, sizeof path, "%s", o.out);
  FILE *file = fopen(path, "w");
  if (!file || fprintf(file, "%s\n\n%s", choice, report) < 0 || fclose(file))
    die("cannot write ", path);
  printf("%s\noffload: %s, with %d threads, for a prompt of %d and an answer of %d tokens\n",
         report, choice, o.threads, o.prompt, o.tokens);
  return fflush(stdout) != 0;
}
