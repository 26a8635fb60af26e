/* Greedy generation from token ids: generate ARTIFACT [options] TOKEN...
 *
 * It tokenises nothing: `bitcompile run` and onnxruntime-genai do, this shows the loop. Token ids
 * go to standard output as they come, times to standard error. */
#define _POSIX_C_SOURCE 200809L

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "bitcompile_model.h"

enum { MOST = 1 << 20 };

static const char USAGE[] =
    "usage: generate ARTIFACT [-n TOKENS] [-t THREADS] [-s] [-e END] [-p PLUGIN] [-l FILE] "
    "TOKEN...\n"
    "  -n  most tokens to generate (32)      -s  let idle threads spin\n"
    "  -t  threads (0: one a core)           -e  token that ends the answer\n"
    "  -p  plugin, if not in the artifact    -l  write the float32 logits of each token here\n";

typedef struct {
  bcm_options model;
  long count, end;
  const char *logits;
  int64_t *prompt;
  size_t prompt_count;
} arguments;

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void die(const char *text, const char *detail) {
  fprintf(stderr, "error: %s%s\n", text, detail);
  exit(1);
}

static long number(const char *text, long least, long most) {
  char *end = NULL;
  errno = 0;
  long value = strtol(text, &end, 10);
  if (errno || end == text || *end || value < least || value > most)
    die("not a number in range: ", text);
  return value;
}

static arguments parse(int argc, char **argv) {
  arguments a = {.count = 32, .end = -1};
  if (argc < 2) die(USAGE, "");
  a.model.folder = argv[1];
  optind = 2;
  for (int option; (option = getopt(argc, argv, "n:t:se:p:l:")) != -1;) {
    if (option == 'n') a.count = number(optarg, 1, MOST);
    if (option == 't') a.model.threads = (int)number(optarg, 0, 1024);
    if (option == 's') a.model.spinning = 1;
    if (option == 'e') a.end = number(optarg, 0, MOST);
    if (option == 'p') a.model.library = optarg;
    if (option == 'l') a.logits = optarg;
    if (option == '?') die(USAGE, "");
  }
  a.prompt_count = (size_t)(argc - optind);
  if (!a.prompt_count) die("no tokens to read\n", USAGE);
  a.prompt = calloc(a.prompt_count, sizeof *a.prompt);
  if (!a.prompt) die("out of memory", "");
  for (size_t i = 0; i < a.prompt_count; i++) a.prompt[i] = number(argv[optind + (int)i], 0, MOST);
  a.model.capacity = a.prompt_count + (size_t)a.count;
  return a;
}

int main(int argc, char **argv) {
  arguments a = parse(argc, argv);
  FILE *log = a.logits ? fopen(a.logits, "wb") : NULL;
  if (a.logits && !log) die("cannot write ", a.logits);
  bcm_model *model = NULL;
  const float *logits = NULL;
  const char *failure;
  double begin = seconds();
  if ((failure = bcm_open(&a.model, &model))) die(failure, "");
  double opened = seconds();
  if ((failure = bcm_feed(model, a.prompt, a.prompt_count, &logits))) die(failure, "");
  double read = seconds();
  long made = 0;
  for (;;) {
    if (log) fwrite(logits, sizeof *logits, bcm_vocabulary(model), log);
    int64_t token = bcm_argmax(logits, bcm_vocabulary(model));
    printf(made ? " %lld" : "%lld", (long long)token);
    fflush(stdout); /* a caller sees each token when it is there */
    if (++made == a.count || token == a.end) break;
    if ((failure = bcm_feed(model, &token, 1, &logits))) die(failure, "");
  }
  double done = seconds();
  printf("\n");
  fprintf(stderr, "open %.2f s, prompt %.1f tokens/s", opened - begin,
          (double)a.prompt_count / (read - opened));
  if (made > 1) fprintf(stderr, ", decode %.1f tokens/s", (double)(made - 1) / (done - read));
  fprintf(stderr, ", KV cache %.1f MB\n", 1e-6 * (double)bcm_cache_bytes(model));
  if (log && fclose(log)) die("cannot write ", a.logits);
  bcm_close(model);
  free(a.prompt);
  return 0;
}
