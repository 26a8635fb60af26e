/* See stdlib.h. */
#ifndef BITCOMPILE_LIBC_SYS_STAT_H
#define BITCOMPILE_LIBC_SYS_STAT_H

int mkdir(const char *path, unsigned mode);

#endif
