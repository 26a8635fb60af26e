/* Huge pages under weights that are mapped files. */
#ifndef BITCOMPILE_PAGES_H
#define BITCOMPILE_PAGES_H
#include <stddef.h>

typedef struct MappedFile MappedFile;

/* Where `bytes` at `data` are to be read: in a mapping of the whole file that holds them, which
 * `file` then keeps (NULL before: any file; else that one alone), or at `data`. */
const void *bc_huge_pages(const void *data, size_t bytes, MappedFile **file);
void bc_release_pages(MappedFile *file);

#endif
