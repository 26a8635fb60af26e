/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_PTHREAD_H
#define BITCOMPILE_LIBC_PTHREAD_H
#include <stdint.h>

typedef struct { /* of 64-bit Android; all zeros is an open lock */
  int32_t bytes[10];
} pthread_mutex_t;
#define PTHREAD_MUTEX_INITIALIZER {{0}}

typedef struct {
  int32_t bytes[12];
} pthread_cond_t;
#define PTHREAD_COND_INITIALIZER {{0}}
typedef long pthread_t;

int pthread_create(pthread_t *out, const void *attributes, void *(*run)(void *), void *argument);
int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *lock);
int pthread_cond_broadcast(pthread_cond_t *condition);
int pthread_mutex_lock(pthread_mutex_t *lock);
int pthread_mutex_unlock(pthread_mutex_t *lock);

#endif
