/* What the plugin uses of the C library of Android and iOS: declarations of our own, so that
 * neither NDK nor Xcode is needed. */
#ifndef BITCOMPILE_LIBC_STDLIB_H
#define BITCOMPILE_LIBC_STDLIB_H
#include <stddef.h>

void *malloc(size_t size);
void *calloc(size_t count, size_t size);
int posix_memalign(void **out, size_t alignment, size_t size);
void free(void *block);
char *getenv(const char *name);
int setenv(const char *name, const char *value, int replace);
long long strtoll(const char *restrict text, char **restrict end, int base);
double strtod(const char *restrict text, char **restrict end);
void exit(int status) __attribute__((noreturn));

#endif
