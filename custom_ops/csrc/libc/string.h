/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_STRING_H
#define BITCOMPILE_LIBC_STRING_H
#include <stddef.h>

void *memcpy(void *restrict to, const void *restrict from, size_t count);
void *memset(void *to, int value, size_t count);
int memcmp(const void *a, const void *b, size_t count);
size_t strlen(const char *text);
char *strstr(const char *text, const char *part);
char *strrchr(const char *text, int character);
int strcmp(const char *a, const char *b);
int strncmp(const char *a, const char *b, size_t count);
char *strchr(const char *text, int character);

#endif
