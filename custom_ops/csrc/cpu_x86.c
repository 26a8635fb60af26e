/* CPU features of x86-64, by CPUID and XGETBV (Intel SDM vol. 2A, CPUID; vol. 1, 13.3). */
#if defined(__x86_64__)
#include <cpuid.h>
#include <string.h>

#include "kernels.h"

enum { EBX = 1, ECX = 2, EDX = 3 };

static const struct {
  const char *name;
  int subleaf, reg, bit;
  unsigned state; /* XCR0 bits the operating system must save: 6 = xmm+ymm, 0xe6 = zmm too */
} features[] = {
    {"avx2", 0, EBX, 5, 0x06},        {"avx512f", 0, EBX, 16, 0xe6},
    {"avx512dq", 0, EBX, 17, 0xe6},   {"avx512bw", 0, EBX, 30, 0xe6},
    {"avx512vl", 0, EBX, 31, 0xe6},   {"avx512vbmi", 0, ECX, 1, 0xe6},
    {"avx512vnni", 0, ECX, 11, 0xe6}, {"avxvnni", 1, 0, 4, 0x06},
};

static unsigned saved_state(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0; /* no OSXSAVE */
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return a;
}

int bc_cpu_has(const char *feature) {
  for (size_t i = 0; i < sizeof features / sizeof *features; i++) {
    unsigned reg[4];
    if (strcmp(feature, features[i].name)) continue;
    if (!__get_cpuid_count(7, (unsigned)features[i].subleaf, &reg[0], &reg[1], &reg[2], &reg[3]))
      return 0;
    return (reg[features[i].reg] >> features[i].bit & 1) &&
           (saved_state() & features[i].state) == features[i].state;
  }
  return 0;
}
#endif
