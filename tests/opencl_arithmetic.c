/* The arithmetic of targets/tir/opencl/prelude.cl, compiled as C, against the processor's IEEE
 * operations. ROUGH = n: the device's division is off by up to n units in the last place. Prints
 * what differs; silence is success. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef unsigned int uint;
typedef int int4 __attribute__((ext_vector_type(4)));
typedef signed char char4 __attribute__((ext_vector_type(4)));
#define CAST(name, to, from)   \
  static to name(from value) { \
    to out;                    \
    memcpy(&out, &value, 4);   \
    return out;                \
  }
CAST(as_float, float, uint)
CAST(as_uint, uint, float)
CAST(as_int, int, float)
CAST(as_char4, char4, uint)
#define convert_int4(v) __builtin_convertvector(v, int4)
#define clz __builtin_clz
#define fma fmaf
#define fabs fabsf
#define sqrt sqrtf
#define inline static __attribute__((unused)) inline

static uint seed = 1;
static uint next(void) {
  seed = seed * 1664525u + 1013904223u;
  return seed >> 8 ^ seed << 13;
}
static float rough(float a, float b) {
  int off = ROUGH ? (int)(next() % (2 * ROUGH + 1)) - ROUGH : 0;
  return a == 0 ? a / b : as_float(as_uint(a / b) + (uint)off);
}
#define BC_DIVIDE rough
#include "prelude.cl"

static long wrong;
static void divide(float a, float b) {
  float got = bc_divide(a, b), want = a / b;
  if (as_uint(got) == as_uint(want) || (got != got && want != want)) return;
  if (wrong++ < 5) printf("%a / %a = %a, not %a\n", a, b, want, got);
}
static void root(float a) {
  float got = bc_sqrt(a), want = sqrtf(a);
  if (as_uint(got) == as_uint(want) || (got != got && want != want)) return;
  if (wrong++ < 5) printf("sqrt(%a) = %a, not %a\n", a, want, got);
}

int main(void) {
  static const uint special[] = {0,          1,          0x7fffff,   0x800000,   0x800001,
                                 0x3f800000, 0x3f7fffff, 0x3f800001, 0x7f7fffff, 0x7f800000,
                                 0x7fc00000, 0x00ffffff, 0x7effffff, 0x34000000, 0x4b800000};
  enum { SPECIAL = sizeof special / sizeof *special };
  for (int i = 0; i < SPECIAL * SPECIAL * 4; i++)
    divide(as_float(special[i % SPECIAL] | (uint)(i & 1) << 31),
           as_float(special[i / SPECIAL % SPECIAL] | (uint)(i / SPECIAL / SPECIAL & 1) << 31));
  for (int i = 0; i < SPECIAL; i++) root(as_float(special[i])), root(-as_float(special[i]));
  for (uint m = 0; m < 1u << 23; m++) { /* every significand */
    divide(1.0f, as_float(m | 0x3f800000u));
    root(as_float(m | 0x3f800000u));
    root(as_float(m | 0x40000000u));
  }
  for (int i = 0; i < 1 << 22; i++) {
    float b = as_float((next() & 0x7fffff) | 0x3f800000u),
          q = as_float((next() & 0x7fffff) | 0x3f800000u);
    /* Quotients as near to half-way between two floats as they come. */
    double middle = q + 0x1p-24;
    float a = (float)(middle * b);
    divide(a, b);
    divide(as_float(as_uint(a) + 1), b);
    divide(as_float(as_uint(a) - 1), b);
    divide(as_float(next()), as_float(next()));                          /* anything at all */
    divide(as_float(next() & 0x9ffffff), as_float(next() | 0x50000000)); /* small by large */
    root(as_float(next() & 0x7fffffff));
  }
  if (wrong) printf("%ld wrong\n", wrong);
  return wrong != 0;
}
