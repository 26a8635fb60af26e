/* What Android's libonnxruntime4j_jni.so needs of Android, on a desktop's C library.
 *
 * Its references carry the version LIBC, which only a library without versions satisfies here. The
 * same file also stands in for libonnxruntime.so and passes on to the desktop's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

extern void *__libc_malloc(size_t);
extern void *__libc_realloc(void *, size_t);
extern void __libc_free(void *);

void *malloc(size_t n) { return __libc_malloc(n); }
void *realloc(void *p, size_t n) { return __libc_realloc(p, n); }
void free(void *p) { __libc_free(p); }
void *memcpy(void *restrict to, const void *restrict from, size_t n) {
  return memmove(to, from, n);
}
size_t strlen(const char *text) { return strnlen(text, (size_t)-1 >> 1); }

/* The process ends with these libraries still loaded. */
int __cxa_atexit(void (*f)(void *), void *argument, void *library) {
  (void)f, (void)argument, (void)library;
  return 0;
}
void __cxa_finalize(void *library) { (void)library; }
int __register_atfork(void (*a)(void), void (*b)(void), void (*c)(void), void *library) {
  (void)a, (void)b, (void)c, (void)library;
  return 0;
}
void __stack_chk_fail(void) { abort(); }
int dlclose(void *library) {
  (void)library;
  return 0;
}

const void *OrtGetApiBase(void) {
  void *library = dlopen(getenv("DESKTOP_ONNXRUNTIME"), RTLD_NOW);
  if (!library) abort();
  return ((const void *(*)(void))dlsym(library, "OrtGetApiBase"))();
}
void *OrtSessionOptionsAppendExecutionProvider_CPU(void *options, int arena) {
  (void)options, (void)arena;
  return NULL;
}
void *OrtSessionOptionsAppendExecutionProvider_Nnapi(void *options, unsigned flags) {
  (void)options, (void)flags;
  return NULL;
}
