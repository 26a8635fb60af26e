/* Calls the plugin's kernels on arrays from stdin and writes the arrays they made to stdout: what
 * tests/kernels.py speaks. With an argument it only prints the variant that was picked.
 *
 * A call: name [24], count, then per argument a tag and a value: 'i' int32, 'f' float, or 'b' bytes
 * int64 and the data, 'o' the same for an array to be written back. Little endian. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { MAX_ARGUMENTS = 20, NAME = 24, ALIGN = 64 };

typedef struct Argument {
  char tag;
  int32_t i;
  float f;
  int64_t bytes;
  void *data;
} Argument;

static void take(void *to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) == bytes) return;
  fprintf(stderr, "driver: the input ends inside a call\n");
  exit(2);
}

static void read_argument(Argument *a) {
  take(&a->tag, 1);
  if (a->tag == 'i') take(&a->i, sizeof a->i);
  if (a->tag == 'f') take(&a->f, sizeof a->f);
  if (a->tag == 'i' || a->tag == 'f') return;
  take(&a->bytes, sizeof a->bytes);
  a->data = aligned_alloc(ALIGN, (size_t)(a->bytes / ALIGN + 1) * ALIGN);
  take(a->data, (size_t)a->bytes);
}

#define P(n) a[n].data
#define I(n) a[n].i
static int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static int coding_of(const char *kind) { return strcmp(kind, "t5") ? BC_I2 : BC_T5; }

/* As gemm_task of cpu.c: some weight rows times as many activation rows as the workspace holds. */
static void gemm(const bc_variant *v, Argument *a, const char *kind) {
  static _Alignas(ALIGN) uint8_t panel[BC_MAX_PANEL];
  static _Alignas(ALIGN) int32_t partial[BC_MAX_PARTIAL];
  int grouped = !strcmp(kind, "grouped"), coding = coding_of(kind);
  int32_t step = v->gemm_rows * BC_GEMM_BLOCKS, G = grouped ? I(15) : 1, KB = I(14);
  int32_t quads = coding == BC_T5 ? 5 : 4; /* 4-column steps of a tile */
  for (int32_t tile = 0; tile < I(12); tile += v->gemm_tiles)
    for (int32_t m = 0; m < I(13); m += step) {
      int32_t n = tile * 16, tiles = least(I(12) - tile, v->gemm_tiles), M = least(I(13) - m, step);
      const uint8_t *w = (uint8_t *)P(0) + (int64_t)tile * KB * 64;
      const int32_t *q = (int32_t *)P(1) + (int64_t)m * KB * quads, *qsum = (int32_t *)P(2) + m * G;
      const float *s = (float *)P(3) + m, *scale = (float *)P(4) + (int64_t)n * G;
      const float *bias = (float *)P(5) + n, *residual = (float *)P(6) + m * I(9) + n;
      float *y = (float *)P(7) + m * I(9) + n;
      if (grouped)
        v->gemm_grouped(w, q, qsum, s, scale, bias, residual, y, I(8) - n, I(9), I(10), I(11),
                        tiles, M, KB, G, I(16), panel, (float *)partial);
      else
        v->gemm[coding](w, q, qsum, s, scale, bias, residual, y, I(8) - n, I(9), I(10), I(11),
                        tiles, M, KB, panel, partial);
    }
}

static void gemv(const bc_variant *v, Argument *a, const char *kind) {
  if (!strcmp(kind, "grouped"))
    v->gemv_grouped(P(0), P(1), P(2), P(3), P(4), P(5), P(6), P(7), I(8), I(9), I(10), I(11), I(12),
                    I(13), I(14), I(15), I(16));
  else
    v->gemv[coding_of(kind)](P(0), P(1), P(2), P(3), P(4), P(5), P(6), P(7), I(8), I(9), I(10),
                             I(11), I(12), I(13), I(14));
}

static int call(const bc_variant *v, const char *name, Argument *a) {
  static const char *activations[BC_ACTIVATIONS] = {"relu2", "silu", "gelu_tanh", "gelu_erf"};
  for (int i = 0; i < BC_ACTIVATIONS; i++)
    if (!strcmp(name, activations[i]))
      return v->glu[i](P(0), P(1), P(2), I(3), I(4), I(5), I(6)), 1;
  int eight = name[strlen(name) - 1] == '8';
  if (!strcmp(name, "quantize"))
    v->quantize(P(0), P(1), P(2), P(3), I(4), I(5), I(6));
  else if (!strcmp(name, "norm_quantize"))
    v->norm_quantize(P(0), P(1), P(2), P(3), P(4), I(5), I(6), I(7), a[8].f);
  else if (!strcmp(name, "group_sums"))
    v->group_sums(P(0), P(1), I(2), I(3), I(4), I(5));
  else if (!strncmp(name, "gemv_", 5))
    gemv(v, a, name + 5);
  else if (!strncmp(name, "gemm_", 5))
    gemm(v, a, name + 5);
  else if (!strncmp(name, "head_quantize", 13))
    (eight ? v->head_quantize8 : v->head_quantize4)(P(0), P(1), P(2), P(3), P(4), I(5), I(6), I(7),
                                                    I(8));
  else if (!strncmp(name, "head", 4))
    (eight ? v->head8 : v->head4)(P(0), P(1), P(2), P(3), P(4), P(5), P(6), I(7), I(8), I(9), I(10),
                                  I(11));
  else
    return 0;
  return 1;
}

static BcStatus *BC_CALL refuse(int code, const char *text) {
  fprintf(stderr, "%s\n", text);
  exit(2 + code);
}

int main(int count, char **unused) {
  (void)unused;
  BcApi api = {{(void *)refuse}}; /* slot 0 is CreateStatus, all that opening the device calls */
  const void *state = NULL;
  bc_device->open(&api, &state);
  const bc_variant *v = state;
  if (count > 1) return puts(v->isa) < 0;
  for (char name[NAME]; fread(name, 1, NAME, stdin) == NAME;) {
    Argument a[MAX_ARGUMENTS] = {{0}};
    int32_t arguments;
    take(&arguments, sizeof arguments);
    if (arguments > MAX_ARGUMENTS) return 2;
    for (int i = 0; i < arguments; i++) read_argument(&a[i]);
    if (!call(v, name, a)) return fprintf(stderr, "driver: no kernel %s\n", name), 2;
    for (int i = 0; i < arguments; i++) {
      if (a[i].tag == 'o') fwrite(a[i].data, 1, (size_t)a[i].bytes, stdout);
      free(a[i].data);
    }
  }
  return fflush(stdout) != 0;
}
