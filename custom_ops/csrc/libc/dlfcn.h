/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_DLFCN_H
#define BITCOMPILE_LIBC_DLFCN_H

#define RTLD_LOCAL 0
#define RTLD_NOW 2 /* of 64-bit Android */

typedef struct {
  const char *dli_fname;
  void *dli_fbase;
  const char *dli_sname;
  void *dli_saddr;
} Dl_info;

void *dlopen(const char *name, int flags);
void *dlsym(void *library, const char *name);
int dladdr(const void *address, Dl_info *info);

#endif
