/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_STDIO_H
#define BITCOMPILE_LIBC_STDIO_H
#include <stdarg.h>
#include <stddef.h>

typedef struct FILE FILE;
extern FILE *stdout, *stderr; /* Android: from API level 23 on */
#define EOF (-1)

FILE *fopen(const char *restrict path, const char *restrict mode);
int fclose(FILE *file);
size_t fread(void *restrict to, size_t size, size_t count, FILE *restrict file);
size_t fwrite(const void *restrict from, size_t size, size_t count, FILE *restrict file);
int fgetc(FILE *file);
int fflush(FILE *file);
int printf(const char *restrict format, ...) __attribute__((format(printf, 1, 2)));
int fprintf(FILE *restrict file, const char *restrict format, ...)
    __attribute__((format(printf, 2, 3)));
int rename(const char *from, const char *to);
int remove(const char *path);
int snprintf(char *restrict to, size_t size, const char *restrict format, ...)
    __attribute__((format(printf, 3, 4)));
int vsnprintf(char *restrict to, size_t size, const char *restrict format, va_list arguments);

#endif
