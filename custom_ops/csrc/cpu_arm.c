/* CPU features of AArch64: from the auxiliary vector (Linux, Android) or sysctl (macOS, iOS). */
#if defined(__aarch64__)
#include <stddef.h>
#include <string.h>

#include "kernels.h"

typedef struct Feature {
  const char *name;
  unsigned long type, bit; /* entry of the auxiliary vector and bit in it (Linux, asm/hwcap.h) */
  const char *sysctl;
} Feature;

enum { HWCAP = 16, HWCAP2 = 26 }; /* AT_HWCAP, AT_HWCAP2 */

static const Feature features[] = {
    {"asimddp", HWCAP, 20, "hw.optional.arm.FEAT_DotProd"},
    {"i8mm", HWCAP2, 13, "hw.optional.arm.FEAT_I8MM"},
};

#ifdef __APPLE__
int sysctlbyname(const char *name, void *old, size_t *old_size, void *value, size_t value_size);

static int present(const Feature *feature) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(feature->sysctl, &value, &size, NULL, 0) == 0 && value != 0;
}
#else
unsigned long getauxval(unsigned long type); /* glibc 2.16, every Android with 64 bits */

static int present(const Feature *feature) { return getauxval(feature->type) >> feature->bit & 1; }
#endif

int bc_cpu_has(const char *feature) {
  for (size_t i = 0; i < sizeof features / sizeof *features; i++)
    if (!strcmp(feature, features[i].name)) return present(&features[i]);
  return 0;
}
#endif
