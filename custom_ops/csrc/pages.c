/* A decode step reads every page of the weights, and the processor's table of pages is too small
 * for them: with pages of 2 MiB a product takes a tenth less where memory is fast.
 *
 * ONNX Runtime maps every tensor on its own, and a huge page must lie within one mapping. So the
 * whole file is mapped once more, for all nodes and sessions that this library serves: memory holds
 * its pages once. Where Linux cannot tell what lies at an address (before 6.11) the tensor's own
 * mapping asks for huge pages; where the file system has none, it is the same pages at another
 * address. */
#include "pages.h"

#ifdef __linux__
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Which the headers of a strict C11 hide. */
int close(int file);
int ioctl(int file, unsigned long request, ...);
int madvise(void *begin, size_t bytes, int advice);
int munmap(void *begin, size_t bytes);
int open(const char *path, int flags, ...);
long lseek(int file, long offset, int whence);
long pread(int file, void *out, size_t bytes, long offset);
unsigned long getauxval(unsigned long type);
void *mmap(void *address, size_t bytes, int protection, int flags, int file, long offset);
enum {
  PAGE_SIZE = 6,        /* AT_PAGESZ */
  HUGE_PAGES = 14,      /* MADV_HUGEPAGE */
  READ_ONLY = 02000000, /* O_RDONLY | O_CLOEXEC */
  READABLE = 1,         /* PROT_READ */
  PRIVATE = 2,          /* MAP_PRIVATE */
  END = 2,              /* SEEK_END */
  LONGEST_PATH = 4096,
  HUGE = 1 << 21,
};

typedef struct Region { /* struct procmap_query, <linux/fs.h> */
  uint64_t size, flags, address, begin, end, protection, page, offset, inode;
  uint32_t major, minor, path_size, id_size;
  uint64_t path, id;
} Region;
#define PROCMAP_QUERY 0xc0686611ul /* _IOWR('f', 17, struct procmap_query) */
/* Bits of a page in /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst). */
#define OF_FILE (1ull << 61)
#define SWAPPED (1ull << 62)
#define PRESENT (1ull << 63)

struct MappedFile {
  char *base;
  uint64_t bytes, inode;
  uint32_t major, minor;
  int users;
  MappedFile *next;
  char path[];
};
static MappedFile *files;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* The mapping around an address, and its file's path. */
static int find(const void *data, Region *out, char *path) {
  int maps = open("/proc/self/maps", READ_ONLY), result = -1;
  *out = (Region){.size = sizeof *out,
                  .address = (uintptr_t)data,
                  .path_size = LONGEST_PATH,
                  .path = (uintptr_t)path};
  path[0] = 0;
  if (maps >= 0) result = ioctl(maps, PROCMAP_QUERY, out);
  if (maps >= 0) close(maps);
  return !result && path[0] == '/';
}

/* Whether memory holds what the file does: a private mapping may have been written to, and then has
 * pages of its own. */
static int as_in_file(const void *data, size_t bytes) {
  uint64_t pages[512];
  size_t page = getauxval(PAGE_SIZE);
  uintptr_t next = (uintptr_t)data / page, end = ((uintptr_t)data + bytes + page - 1) / page;
  int map = open("/proc/self/pagemap", READ_ONLY), equal = map >= 0;
  while (equal && next < end) {
    size_t count = end - next < 512 ? end - next : 512;
    equal = pread(map, pages, count * 8, (long)next * 8) == (long)count * 8;
    for (size_t i = 0; equal && i < count; i++)
      equal = !(pages[i] & SWAPPED) && (!(pages[i] & PRESENT) || pages[i] & OF_FILE);
    next += count;
  }
  if (map >= 0) close(map);
  return equal;
}

/* Some file systems number the inodes of their parts alike, so the path counts too. */
static int same(const MappedFile *file, const Region *region, const char *path) {
  return file->inode == region->inode && file->major == region->major &&
         file->minor == region->minor && !strcmp(file->path, path);
}

static void unmap(MappedFile *file) {
  munmap(file->base, file->bytes);
  free(file);
}

static MappedFile *map_whole(const Region *region, const char *path) {
  size_t length = strlen(path) + 1;
  MappedFile *file = calloc(1, sizeof *file + length);
  char own_path[LONGEST_PATH];
  Region own;
  int opened = open(path, READ_ONLY);
  long bytes = opened < 0 ? -1 : lseek(opened, 0, END);
  void *base = bytes < HUGE ? (void *)-1 : mmap(NULL, (size_t)bytes, READABLE, PRIVATE, opened, 0);
  if (opened >= 0) close(opened);
  if (base == (void *)-1 || !file) {
    if (base != (void *)-1) munmap(base, (size_t)bytes);
    free(file);
    return NULL;
  }
  file->base = base;
  file->bytes = (uint64_t)bytes;
  file->inode = region->inode;
  file->major = region->major;
  file->minor = region->minor;
  memcpy(file->path, path, length);
  /* Another file may have taken the name. */
  if (!madvise(base, (size_t)bytes, HUGE_PAGES) && find(base, &own, own_path) &&
      same(file, &own, own_path))
    return file;
  unmap(file);
  return NULL;
}

static const void *whole(const void *data, size_t bytes, MappedFile **kept) {
  char path[LONGEST_PATH];
  Region region;
  if (!find(data, &region, path) || (uintptr_t)data + bytes > region.end ||
      (*kept && !same(*kept, &region, path)) || !as_in_file(data, bytes))
    return NULL;
  uint64_t first = region.offset + ((uintptr_t)data - region.begin);
  MappedFile *file = files;
  while (file && !same(file, &region, path)) file = file->next;
  if (!file && (file = map_whole(&region, path))) {
    if (first + bytes > file->bytes) {
      unmap(file);
      return NULL;
    }
    file->next = files;
    files = file;
  }
  if (!file || first + bytes > file->bytes) return NULL;
  if (!*kept) file->users++;
  *kept = file;
  return file->base + first;
}

const void *bc_huge_pages(const void *data, size_t bytes, MappedFile **kept) {
  uintptr_t begin = (uintptr_t)data, before = begin % getauxval(PAGE_SIZE);
  pthread_mutex_lock(&lock);
  const void *found = whole(data, bytes, kept);
  pthread_mutex_unlock(&lock);
  if (found) return found;
  if (bytes >= HUGE) (void)madvise((void *)(begin - before), bytes + before, HUGE_PAGES);
  return data;
}

void bc_release_pages(MappedFile *file) {
  if (!file) return;
  pthread_mutex_lock(&lock);
  if (!--file->users) {
    MappedFile **link = &files;
    while (*link != file) link = &(*link)->next;
    *link = file->next;
    unmap(file);
  }
  pthread_mutex_unlock(&lock);
}
#else
const void *bc_huge_pages(const void *data, size_t bytes, MappedFile **file) {
  (void)bytes, (void)file;
  return data;
}
void bc_release_pages(MappedFile *file) { (void)file; }
#endif
