/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_TIME_H
#define BITCOMPILE_LIBC_TIME_H

struct timespec { /* of 64-bit Android */
  long tv_sec, tv_nsec;
};
#define CLOCK_MONOTONIC 1

int clock_gettime(int clock, struct timespec *out);

#endif
