/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_UNISTD_H
#define BITCOMPILE_LIBC_UNISTD_H

int getpid(void);

#endif
