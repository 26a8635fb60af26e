/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_STRING_H
#define BITCOMPILE_LIBC_STRING_H
#include <stddef.h>

void *memcpy(void *restrict to, const void *restrict from, size_t count);
void *memset(void *to, int value, size_t count);
int strcmp(const char *a, const char *b);
char *strchr(const char *text, int character);

#endif
