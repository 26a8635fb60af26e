/* Finding an OpenCL driver and a device, and building the program, from the cache if it is there.
 * Nothing the driver says is trusted: a probe kernel checks the arithmetic at every start. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* dladdr */
#endif
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "opencl.h"

#pragma STDC FP_CONTRACT OFF

enum { FOLDER = 1024, PATH = 1100, LOG = 600, MOST_DEVICES = 16 };

int bc_cl_fault(Cl *cl, const char *format, ...) {
  va_list arguments;
  if (cl->fault[0]) return 1;
  va_start(arguments, format);
  vsnprintf(cl->fault, sizeof cl->fault, format, arguments);
  va_end(arguments);
  return 1;
}

const char *bc_cl_error(int32_t code, char *text, size_t size) {
  const char *name = code == CL_NO_MEMORY || code == CL_NO_HOST_MEMORY ? "out of memory"
                     : code == CL_NO_RESOURCES                         ? "out of resources"
                     : code == CL_BUILD_FAILED                         ? "build failure"
                     : code == CL_NO_DEVICE                            ? "no device"
                                                                       : "error";
  snprintf(text, size, "%s (%d)", name, (int)code);
  return text;
}

/* ---- driver and device ----------------------------------------------------------------------- */

static int load_driver(Cl *cl) {
  static const char *names[] = {
      "libOpenCL.so",
      "libOpenCL.so.1",
      "libOpenCL-pixel.so",
      "/vendor/lib64/libOpenCL.so",
      "/system/vendor/lib64/libOpenCL.so",
      "/vendor/lib64/egl/libGLES_mali.so",
      "/system/vendor/lib64/egl/libGLES_mali.so",
      "libGLES_mali.so",
      "libmali.so.1",
      "libPVROCL.so",
  };
  void *library = NULL;
  for (size_t i = 0; i < sizeof names / sizeof *names && !library; i++)
    library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
  cl->library = library;
  if (!library) return bc_cl_fault(cl, "no OpenCL driver (libOpenCL.so): install the GPU's driver");
#define BC_CL_LOAD(name, result, parameters)            \
  *(void **)&cl->api.name = dlsym(library, "cl" #name); \
  if (!cl->api.name)                                    \
    return bc_cl_fault(cl, "the OpenCL driver lacks cl" #name ": update the GPU's driver");
  BC_CL_FUNCTIONS(BC_CL_LOAD)
  return 0;
}

static void info(Cl *cl, ClDevice device, int64_t key, void *out, size_t size) {
  memset(out, 0, size);
  cl->api.GetDeviceInfo(device, (uint32_t)key, size, out, NULL);
}

/* Takes the first GPU, else the first device, whose platform or name contains what
 * BITCOMPILE_CL_DEVICE says. */
static int choose_device(Cl *cl) {
  const char *wanted = getenv("BITCOMPILE_CL_DEVICE");
  const int64_t kinds[] = {CL_DEVICE_GPU, CL_DEVICE_ANY};
  ClPlatform platforms[MOST_DEVICES];
  uint32_t count = 0;
  if (cl->api.GetPlatformIDs(MOST_DEVICES, platforms, &count)) count = 0;
  if (count > MOST_DEVICES) count = MOST_DEVICES;
  for (int kind = 0; kind < 2; kind++)
    for (uint32_t p = 0; p < count; p++) {
      ClDevice devices[MOST_DEVICES];
      uint32_t found = 0;
      char platform[160] = "";
      cl->api.GetPlatformInfo(platforms[p], (uint32_t)CL_PLATFORM, sizeof platform - 1, platform,
                              NULL);
      if (cl->api.GetDeviceIDs(platforms[p], (uint64_t)kinds[kind], MOST_DEVICES, devices, &found))
        continue;
      for (uint32_t d = 0; d < found && d < MOST_DEVICES; d++) {
        info(cl, devices[d], CL_NAME, cl->name, sizeof cl->name - 1);
        if (wanted && *wanted && !strstr(platform, wanted) && !strstr(cl->name, wanted)) continue;
        cl->device = devices[d];
        return 0;
      }
    }
  if (wanted && *wanted)
    return bc_cl_fault(cl, "no OpenCL device is called %s: unset BITCOMPILE_CL_DEVICE", wanted);
  return bc_cl_fault(cl, "no OpenCL device: install the GPU's driver");
}

/* What the kernels take for granted. */
static int check_device(Cl *cl) {
  uint32_t little = 0, compiler = 0, unified = 0, align = 0;
  uint64_t local = 0, largest = 0;
  size_t group = 0;
  char profile[32];
  int32_t most = 0;
  info(cl, cl->device, CL_DRIVER, cl->driver, sizeof cl->driver - 1);
  info(cl, cl->device, CL_PROFILE, profile, sizeof profile - 1);
  info(cl, cl->device, CL_LITTLE_ENDIAN, &little, sizeof little);
  info(cl, cl->device, CL_COMPILER, &compiler, sizeof compiler);
  info(cl, cl->device, CL_UNIFIED, &unified, sizeof unified);
  info(cl, cl->device, CL_ADDRESS_ALIGN, &align, sizeof align);
  info(cl, cl->device, CL_LOCAL_BYTES, &local, sizeof local);
  info(cl, cl->device, CL_MAX_ALLOC, &largest, sizeof largest);
  info(cl, cl->device, CL_MAX_GROUP, &group, sizeof group);
  cl->unified = unified != 0;
  cl->largest = (size_t)largest;
  cl->align = align >= 64 * 8 ? align / 8 : 64;
  for (int i = 0; i < CLK_KERNELS; i++) {
    int32_t items = bc_cl_kernels[i].items[0] * bc_cl_kernels[i].items[1];
    if (items > most) most = items;
  }
  if (!little || !compiler || strcmp(profile, "FULL_PROFILE"))
    return bc_cl_fault(cl, "%s has no %s, which the kernels need: use another device", cl->name,
                       !little     ? "little-endian order"
                       : !compiler ? "compiler"
                                   : "full OpenCL profile");
  if (group < (size_t)most || local < 16384)
    return bc_cl_fault(cl,
                       "%s has work-groups of %zu items and %llu bytes of local memory; the "
                       "kernels need %d and 16384: use another device",
                       cl->name, group, (unsigned long long)local, (int)most);
  return 0;
}

static int open_device(Cl *cl) {
  int32_t code = 0;
  char why[64];
  if (load_driver(cl) || choose_device(cl) || check_device(cl)) return 1;
  cl->context = cl->api.CreateContext(NULL, 1, &cl->device, NULL, NULL, &code);
  if (cl->context) cl->queue = cl->api.CreateCommandQueue(cl->context, cl->device, 0, &code);
  if (cl->queue) return 0;
  return bc_cl_fault(cl, "%s cannot be opened, %s: restart the device, or use another", cl->name,
                     bc_cl_error(code, why, sizeof why));
}

/* ---- commands -------------------------------------------------------------------------------- */

int bc_cl_launch(Cl *cl, int which, int64_t groups_x, int64_t groups_y, const char *types, ...) {
  const bc_cl_kernel *k = &bc_cl_kernels[which];
  const size_t local[] = {(size_t)k->items[0], (size_t)k->items[1]};
  const size_t global[] = {(size_t)groups_x * local[0], (size_t)groups_y * local[1]};
  int32_t code = 0;
  char why[64];
  va_list arguments;
  va_start(arguments, types);
  for (uint32_t i = 0; types[i] && !code; i++) {
    ClMem mem;
    int32_t whole;
    float real;
    if (types[i] == 'b') {
      mem = va_arg(arguments, ClMem);
      code = cl->api.SetKernelArg(cl->kernel[which], i, sizeof mem, &mem);
    } else if (types[i] == 'i') {
      whole = va_arg(arguments, int32_t);
      code = cl->api.SetKernelArg(cl->kernel[which], i, sizeof whole, &whole);
    } else {
      real = (float)va_arg(arguments, double);
      code = cl->api.SetKernelArg(cl->kernel[which], i, sizeof real, &real);
    }
  }
  va_end(arguments);
  if (!code)
    code = cl->api.EnqueueNDRangeKernel(cl->queue, cl->kernel[which], 2, NULL, global, local, 0,
                                        NULL, NULL);
  return code ? bc_cl_fault(cl, "%s cannot run %s, %s", cl->name, k->name,
                            bc_cl_error(code, why, sizeof why))
              : 0;
}

int bc_cl_room(Cl *cl, int which, int64_t bytes) {
  Buffer *b = &cl->buffer[which];
  int moves = which == BUFFER_IN || which == BUFFER_OUT;
  int32_t code = 0;
  char why[64];
  if (b->mem && b->bytes >= (size_t)bytes) return 0;
  if (b->mem) cl->api.ReleaseMemObject(b->mem);
  b->bytes = (size_t)bytes;
  b->mem = cl->api.CreateBuffer(
      cl->context, (uint64_t)(CL_READ_WRITE | (moves ? CL_ALLOC_HOST : 0)), b->bytes, NULL, &code);
  if (b->mem) return 0;
  return bc_cl_fault(cl, "%s cannot hold %lld bytes of activations, %s: use shorter sequences",
                     cl->name, (long long)bytes, bc_cl_error(code, why, sizeof why));
}

ClMem bc_cl_constant(Cl *cl, const void *data, size_t bytes) {
  int in_place = cl->zero_copy && (uintptr_t)data % cl->align == 0 && bytes >= 4096;
  int32_t code = 0;
  char why[64];
  ClMem mem = NULL;
  if (bytes == 0 || bytes > cl->largest) {
    bc_cl_fault(cl, "%s holds tensors of up to %zu bytes, not %zu", cl->name, cl->largest, bytes);
    return NULL;
  }
  if (in_place)
    mem = cl->api.CreateBuffer(cl->context, (uint64_t)(CL_READ_ONLY | CL_USE_HOST), bytes,
                               (void *)data, &code);
  if (!mem)
    mem = cl->api.CreateBuffer(cl->context, (uint64_t)(CL_READ_ONLY | CL_COPY_HOST), bytes,
                               (void *)data, &code);
  if (!mem)
    bc_cl_fault(cl, "%s cannot hold a weight of %zu bytes, %s", cl->name, bytes,
                bc_cl_error(code, why, sizeof why));
  return mem;
}

/* ---- the probe: does the device compute what the kernels need? ------------------------------- */

enum { PROBES = 1024 };

typedef struct Probe {
  uint32_t w[PROBES], a[PROBES];
  int32_t c[PROBES];
  float x[PROBES], y[PROBES], z[PROBES];
  int32_t whole[PROBES * 2];
  float real[PROBES * 4];
} Probe;

static uint32_t next_random(uint32_t *seed) {
  *seed = *seed * 1664525u + 1013904223u; /* Numerical Recipes, 7.1 */
  return *seed >> 8 ^ *seed << 13;
}

/* Any significand, and an exponent at which no result leaves the normal range. */
static float random_float(uint32_t *seed) {
  uint32_t bits = next_random(seed) & 0x7fffff, exponent = 127 - 20 + next_random(seed) % 40;
  bits |= exponent << 23;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static int32_t dot4(uint32_t w, uint32_t a, int32_t c) {
  for (int i = 0; i < 32; i += 8) c += (int8_t)(w >> i) * (int8_t)(a >> i);
  return c;
}

static void fill_probe(Probe *p) {
  uint32_t seed = 1;
  for (int i = 0; i < PROBES; i++) {
    /* The first ones hold the ends of the range in every byte. */
    static const uint8_t ends[] = {0, 1, 2, 127, 128, 129, 255, 0x55};
    p->w[i] = i < 64 ? ends[i % 8] * 0x01010101u : next_random(&seed);
    p->a[i] = i < 64 ? ends[i / 8] * 0x01010101u : next_random(&seed);
    p->c[i] = (int32_t)(next_random(&seed) % 4096) - 2048;
    p->x[i] = random_float(&seed);
    p->y[i] = random_float(&seed);
    p->z[i] = (float)((int32_t)(next_random(&seed) % 1023) - 511) * 0.5f;
    p->whole[2 * i] = dot4(p->w[i], p->a[i], p->c[i]);
    p->whole[2 * i + 1] = dot4(p->w[i] & 0x7f7f7f7f, p->a[i], p->c[i]);
    volatile float product = p->x[i] * p->y[i]; /* rounded, and only then added */
    int32_t halves = (int32_t)(2 * p->z[i]);
    p->real[4 * i] = p->x[i] / p->y[i];
    p->real[4 * i + 2] = product + p->z[i];
    /* An odd number of halves goes to the even neighbour. */
    p->real[4 * i + 3] = (float)(halves & 1 ? (halves + (halves & 2 ? 1 : -1)) / 2 : halves / 2);
  }
}

static ClMem probe_buffer(Cl *cl, void *data, size_t bytes) {
  int32_t code = 0;
  return cl->api.CreateBuffer(cl->context, (uint64_t)(CL_READ_WRITE | CL_COPY_HOST), bytes, data,
                              &code);
}

/* Whether root is the float nearest to the square root of x. The ends of the interval that rounds
 * to it have 25 bits, so that doubles hold their squares exactly. */
static int nearest_root(float root, float x) {
  uint32_t bits;
  float below, above;
  memcpy(&bits, &root, sizeof bits);
  bits--;
  memcpy(&below, &bits, sizeof below);
  bits += 2;
  memcpy(&above, &bits, sizeof above);
  double low = ((double)below + root) / 2, high = ((double)root + above) / 2;
  return low * low < x && x < high * high;
}

/* What differs: 1 dot products, 2 division or square root, 4 an addition that swallowed the
 * rounding of a product, 8 rounding; 16 if it does not run at all. */
static int compare_probe(Cl *cl, ClMem whole, ClMem real, const Probe *p) {
  int32_t code = 0;
  int wrong = 0;
  const int32_t *w = cl->api.EnqueueMapBuffer(cl->queue, whole, 1, (uint64_t)CL_READING, 0,
                                              sizeof p->whole, 0, NULL, NULL, &code);
  if (code || !w) return 16;
  for (int i = 0; i < PROBES * 2; i++) wrong |= w[i] != p->whole[i];
  cl->api.EnqueueUnmapMemObject(cl->queue, whole, (void *)w, 0, NULL, NULL);
  const float *r = cl->api.EnqueueMapBuffer(cl->queue, real, 1, (uint64_t)CL_READING, 0,
                                            sizeof p->real, 0, NULL, NULL, &code);
  if (code || !r) return 16;
  for (int i = 0; i < PROBES; i++) {
    if (r[4 * i] != p->real[4 * i] || !nearest_root(r[4 * i + 1], p->x[i])) wrong |= 2;
    if (r[4 * i + 2] != p->real[4 * i + 2]) wrong |= 4;
    if (r[4 * i + 3] != p->real[4 * i + 3]) wrong |= 8;
  }
  cl->api.EnqueueUnmapMemObject(cl->queue, real, (void *)r, 0, NULL, NULL);
  return wrong;
}

static int run_probe(Cl *cl, ClProgram program) {
  int32_t code = 0;
  int wrong = 16;
  Probe *p = calloc(1, sizeof *p);
  ClKernel saved = cl->kernel[CLK_PROBE];
  if (!p) return wrong;
  fill_probe(p);
  ClMem m[] = {
      probe_buffer(cl, p->w, sizeof p->w),         probe_buffer(cl, p->a, sizeof p->a),
      probe_buffer(cl, p->c, sizeof p->c),         probe_buffer(cl, p->x, sizeof p->x),
      probe_buffer(cl, p->y, sizeof p->y),         probe_buffer(cl, p->z, sizeof p->z),
      probe_buffer(cl, p->whole, sizeof p->whole), probe_buffer(cl, p->real, sizeof p->real)};
  int whole = 1;
  for (int i = 0; i < 8; i++) whole &= m[i] != NULL;
  cl->kernel[CLK_PROBE] = cl->api.CreateKernel(program, bc_cl_kernels[CLK_PROBE].name, &code);
  if (cl->kernel[CLK_PROBE] && whole &&
      !bc_cl_launch(cl, CLK_PROBE, PROBES / bc_cl_kernels[CLK_PROBE].items[0], 1, "bbbbbbbb", m[0],
                    m[1], m[2], m[3], m[4], m[5], m[6], m[7]))
    wrong = compare_probe(cl, m[6], m[7], p);
  cl->api.Finish(cl->queue);
  cl->fault[0] = 0; /* the caller says what it means */
  if (cl->kernel[CLK_PROBE]) cl->api.ReleaseKernel(cl->kernel[CLK_PROBE]);
  cl->kernel[CLK_PROBE] = saved;
  for (int i = 0; i < 8; i++)
    if (m[i]) cl->api.ReleaseMemObject(m[i]);
  free(p);
  return wrong;
}

/* ---- the program ----------------------------------------------------------------------------- */

/* Ways to build it, fastest first. A driver's word that it has an extension is not enough: some
 * reject the built-in under another language version, some compute another product. */
static const struct {
  int dot;
  const char *extension, *options;
} ways[] = {
    {1, "cl_khr_integer_dot_product", "-cl-std=CL3.0 -DBC_DOT=1"},
    {2, "cl_arm_integer_dot_product_accumulate_int8", "-cl-std=CL1.2 -DBC_DOT=2"},
    {4, "cl_arm_integer_dot_product_int8", "-cl-std=CL1.2 -DBC_DOT=4"},
    {3, "cl_qcom_dot_product8", "-cl-std=CL1.2 -DBC_DOT=3"},
    {0, "", "-cl-std=CL1.2 -DBC_DOT=0"},
};
enum { WAYS = sizeof ways / sizeof *ways };

static ClProgram compile(Cl *cl, const char *source, const char *options, char *log) {
  int32_t code = 0;
  size_t length = strlen(source);
  log[0] = 0;
  ClProgram program = cl->api.CreateProgramWithSource(cl->context, 1, &source, &length, &code);
  if (!program) return NULL;
  code = cl->api.BuildProgram(program, 1, &cl->device, options, NULL, NULL);
  if (!code) return program;
  char *text = calloc(1, 1 << 16);
  if (text) {
    cl->api.GetProgramBuildInfo(program, cl->device, (uint32_t)CL_BUILD_LOG, (1 << 16) - 1, text,
                                NULL);
    for (char *c = text; *c; c++)
      if (*c == '\n' || *c == '\r') *c = ' ';
    snprintf(log, LOG, "%s", text);
  }
  free(text);
  cl->api.ReleaseProgram(program);
  return NULL;
}

static const char *blame(int wrong) {
  return wrong & 16  ? "does not run the test kernel"
         : wrong & 1 ? "computes wrong dot products"
         : wrong & 2 ? "divides or takes roots wrongly"
         : wrong & 4 ? "fuses multiplications with additions"
                     : "rounds wrongly";
}

/* Builds from source the first way whose probe is right. */
static int build(Cl *cl, int *way) {
  char extensions[8192], log[LOG];
  int wrong = 0;
  info(cl, cl->device, CL_EXTENSIONS, extensions, sizeof extensions - 1);
  for (*way = 0; *way < WAYS; ++*way) {
    if (!strstr(extensions, ways[*way].extension)) continue;
    ClProgram probe = compile(cl, bc_cl_probe, ways[*way].options, log);
    wrong = 0;
    if (probe) wrong = run_probe(cl, probe);
    if (probe) cl->api.ReleaseProgram(probe);
    if (!probe || wrong) continue;
    cl->program = compile(cl, bc_cl_source, ways[*way].options, log);
    if (cl->program && !(wrong = run_probe(cl, cl->program))) return 0;
    if (cl->program) cl->api.ReleaseProgram(cl->program);
    cl->program = NULL;
  }
  if (wrong) return bc_cl_fault(cl, "%s %s: update the GPU's driver", cl->name, blame(wrong));
  return bc_cl_fault(cl, "%s cannot build the kernels: %s", cl->name, log[0] ? log : "no log");
}

/* ---- its cache ------------------------------------------------------------------------------- */

static uint64_t hash(uint64_t h, const void *data, size_t bytes) { /* FNV-1a */
  const unsigned char *p = data;
  while (bytes--) h = (h ^ *p++) * 1099511628211ull;
  return h;
}

typedef struct Header {
  char magic[8];
  uint64_t key, bytes, sum;
  int32_t way, unused;
} Header;

static const char MAGIC[8] = "bc-cl-1";

static uint64_t cache_key(const Cl *cl) {
  uint64_t h = 14695981039346656037ull;
  h = hash(h, cl->name, strlen(cl->name) + 1);
  h = hash(h, cl->driver, strlen(cl->driver) + 1);
  for (int i = 0; i < WAYS; i++) h = hash(h, ways[i].options, strlen(ways[i].options) + 1);
  return hash(h, bc_cl_source, strlen(bc_cl_source));
}

/* Candidate number i for the cache's folder; 0 if there is none. BITCOMPILE_CACHE is the only one
 * where it is set; then the user's, then the plugin's own. */
static int cache_folder(int i, char *out) {
  static const struct {
    const char *variable, *below;
  } places[] = {{"XDG_CACHE_HOME", "/bitcompile"}, {"HOME", "/.cache/bitcompile"}};
  enum { PLACES = sizeof places / sizeof *places };
  const char *chosen = getenv("BITCOMPILE_CACHE");
  Dl_info self;
  out[0] = 0;
  if (chosen && *chosen) {
    snprintf(out, FOLDER, "%s", chosen);
    return i == 0;
  }
  if (i < PLACES) {
    const char *base = getenv(places[i].variable);
    if (base && *base) snprintf(out, FOLDER, "%s%s", base, places[i].below);
    return 1;
  }
  if (i > PLACES || !dladdr((const void *)bc_cl_source, &self) || !self.dli_fname) return 0;
  const char *end = strrchr(self.dli_fname, '/');
  if (end) snprintf(out, FOLDER, "%.*s", (int)(end - self.dli_fname), self.dli_fname);
  return 1;
}

static int cache_path(const Cl *cl, int i, char *out) {
  char folder[FOLDER];
  if (!cache_folder(i, folder)) return 0;
  out[0] = 0;
  if (folder[0])
    snprintf(out, PATH, "%s/opencl-%016llx.bin", folder, (unsigned long long)cache_key(cl));
  return 1;
}

static int read_whole(const char *path, uint64_t key, Header *header, unsigned char **out) {
  FILE *file = path[0] ? fopen(path, "rb") : NULL;
  *out = NULL;
  if (!file) return 0;
  int good = fread(header, sizeof *header, 1, file) == 1 &&
             !memcmp(header->magic, MAGIC, sizeof MAGIC) && header->key == key &&
             header->bytes > 0 && header->bytes < 1u << 30 && header->way >= 0 &&
             header->way < WAYS;
  if (good) *out = malloc(header->bytes);
  good = *out && fread(*out, 1, header->bytes, file) == header->bytes && fgetc(file) == EOF &&
         hash(0, *out, header->bytes) == header->sum;
  fclose(file);
  if (!good) free(*out), *out = NULL;
  return good;
}

/* The program of a cached binary that still computes what it must. */
static int load_cached(Cl *cl, int *way) {
  char path[PATH];
  for (int i = 0; cache_path(cl, i, path); i++) {
    Header header;
    unsigned char *binary;
    int32_t status = 0, code = 0;
    if (!read_whole(path, cache_key(cl), &header, &binary)) continue;
    size_t bytes = header.bytes;
    *way = header.way;
    cl->program = cl->api.CreateProgramWithBinary(cl->context, 1, &cl->device, &bytes,
                                                  (const unsigned char **)&binary, &status, &code);
    if (cl->program && !status && !code &&
        !cl->api.BuildProgram(cl->program, 1, &cl->device, ways[*way].options, NULL, NULL) &&
        !run_probe(cl, cl->program)) {
      free(binary);
      return 1;
    }
    if (cl->program) cl->api.ReleaseProgram(cl->program);
    cl->program = NULL;
    free(binary);
  }
  return 0;
}

static int write_whole(const char *path, const Header *header, const unsigned char *binary) {
  char temporary[PATH + 32];
  snprintf(temporary, sizeof temporary, "%s.%ld.tmp", path, (long)getpid());
  FILE *file = fopen(temporary, "wb");
  if (!file) return 0;
  int good = fwrite(header, sizeof *header, 1, file) == 1 &&
             fwrite(binary, 1, header->bytes, file) == header->bytes;
  good = fclose(file) == 0 && good && rename(temporary, path) == 0;
  if (!good) remove(temporary);
  return good;
}

/* Keeps the binary in the first folder that takes it; without one every start builds again. */
static void store(Cl *cl, int way) {
  size_t bytes = 0;
  char path[PATH], folder[FOLDER];
  if (cl->api.GetProgramInfo(cl->program, (uint32_t)CL_BINARY_SIZES, sizeof bytes, &bytes, NULL) ||
      !bytes)
    return;
  unsigned char *binary = calloc(1, bytes);
  if (binary &&
      !cl->api.GetProgramInfo(cl->program, (uint32_t)CL_BINARIES, sizeof binary, &binary, NULL)) {
    Header header = {.key = cache_key(cl), .bytes = bytes, .sum = hash(0, binary, bytes)};
    header.way = way;
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    for (int i = 0; cache_path(cl, i, path); i++) {
      if (!path[0]) continue;
      cache_folder(i, folder);
      char *parent = strrchr(folder, '/');
      if (parent && parent != folder) {
        *parent = 0;
        mkdir(folder, 0777);
        *parent = '/';
      }
      mkdir(folder, 0777);
      if (write_whole(path, &header, binary)) break;
    }
  }
  free(binary);
}

static int make_kernels(Cl *cl) {
  for (int i = 0; i < CLK_KERNELS; i++) {
    const bc_cl_kernel *k = &bc_cl_kernels[i];
    int32_t code = 0;
    size_t items = 0;
    cl->kernel[i] = cl->api.CreateKernel(cl->program, k->name, &code);
    if (!cl->kernel[i])
      return bc_cl_fault(cl, "%s lost kernel %s: update the GPU's driver", cl->name, k->name);
    cl->api.GetKernelWorkGroupInfo(cl->kernel[i], cl->device, (uint32_t)CL_KERNEL_GROUP,
                                   sizeof items, &items, NULL);
    if (items < (size_t)(k->items[0] * k->items[1]))
      return bc_cl_fault(cl,
                         "%s runs %s in work-groups of %zu items, not %d: build for another target",
                         cl->name, k->name, items, (int)(k->items[0] * k->items[1]));
  }
  return 0;
}

/* ---- zero copy ------------------------------------------------------------------------------- */

/* Whether kernels read host memory in place: one copies a word out of it, before and after the host
 * changed that word without telling the driver. A driver with a copy of its own shows the old one.
 */
static void measure_zero_copy(Cl *cl) {
  enum { BYTES = 1 << 16, WORDS = BYTES / 4 };
  void *memory = NULL;
  int32_t code = 0, seen[2] = {0, 0};
  if (posix_memalign(&memory, 16384, BYTES)) return;
  memset(memory, 0, BYTES);
  ClMem mem = cl->api.CreateBuffer(cl->context, (uint64_t)(CL_READ_ONLY | CL_USE_HOST), BYTES,
                                   memory, &code);
  int bad = !mem || bc_cl_room(cl, BUFFER_SUMS, BYTES);
  for (int i = 0; i < 2 && !bad; i++) {
    ((volatile int8_t *)memory)[BYTES - 1] = (int8_t)(i + 1);
    /* One group of all columns: its sum is the last byte, the only one that is not 0. */
    bad = bc_cl_launch(cl, CLK_GROUP_SUMS, 1, 1, "bbiii", mem, cl->buffer[BUFFER_SUMS].mem, BYTES,
                       1, BYTES / 16);
    if (bad) break;
    int32_t *sum = cl->api.EnqueueMapBuffer(cl->queue, cl->buffer[BUFFER_SUMS].mem, 1,
                                            (uint64_t)CL_READING, 0, 4, 0, NULL, NULL, &code);
    if (!sum || code) break;
    seen[i] = *sum;
    cl->api.EnqueueUnmapMemObject(cl->queue, cl->buffer[BUFFER_SUMS].mem, sum, 0, NULL, NULL);
    cl->api.Finish(cl->queue);
  }
  if (mem) cl->api.ReleaseMemObject(mem);
  cl->api.Finish(cl->queue);
  cl->fault[0] = 0;
  cl->zero_copy = seen[0] == 1 && seen[1] == 2;
  free(memory);
}

int bc_cl_open(Cl *cl) {
  int way = 0;
  if (open_device(cl)) return 1;
  cl->from_cache = load_cached(cl, &way);
  if (!cl->from_cache) {
    if (build(cl, &way)) return 1;
    store(cl, way);
  }
  cl->dot = ways[way].dot;
  if (make_kernels(cl)) return 1;
  measure_zero_copy(cl);
  return 0;
}
