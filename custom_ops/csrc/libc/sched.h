/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_SCHED_H
#define BITCOMPILE_LIBC_SCHED_H

int sched_yield(void);

#endif
