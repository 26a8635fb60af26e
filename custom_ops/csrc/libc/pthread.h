/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_PTHREAD_H
#define BITCOMPILE_LIBC_PTHREAD_H
#include <stdint.h>

typedef struct { /* of 64-bit Android; all zeros is an open lock */
  int32_t bytes[10];
} pthread_mutex_t;
#define PTHREAD_MUTEX_INITIALIZER {{0}}

int pthread_mutex_lock(pthread_mutex_t *lock);
int pthread_mutex_unlock(pthread_mutex_t *lock);

#endif
