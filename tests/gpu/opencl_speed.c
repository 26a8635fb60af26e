/* What an OpenCL device makes of the kernels: products of the 2B-4T shapes beside a pure read of
 * the same bytes. Weights rotate through more memory than caches hold.
 *
 * Two times a kernel: what the device says it took (profiling events), and a place in the queue
 * when many are enqueued, which has the driver's launch in it. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "opencl.h"

enum { MEGABYTES = 256, MOST_BUFFERS = 256, REPEATS = 5, PROFILING = 2, ROWS = 512 };
enum { COMMAND_START = 0x1282, COMMAND_END = 0x1283 };

typedef int32_t profiling_fn(ClEvent, uint32_t, size_t, void *, size_t *);
typedef int32_t release_event_fn(ClEvent);

static Cl cl;
static profiling_fn *profiling;
static release_event_fn *release_event;

static const char READ[] =
    "kernel void read_all(global const uint4 *w, global uint *out, int count) {\n"
    "  uint4 sum = 0;\n"
    "  for (int i = get_global_id(0); i < count; i += get_global_size(0)) sum ^= w[i];\n"
    "  uint one = sum.x ^ sum.y ^ sum.z ^ sum.w;\n"
    "  if (one == 0x12345678u) out[0] = one;\n" /* never: keeps the loads */
    "}\n";

static void die(const char *text) {
  fprintf(stderr, "error: %s%s%s\n", text, cl.fault[0] ? ": " : "", cl.fault);
  exit(2);
}

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static ClMem device_buffer(size_t bytes, int byte) {
  int32_t code = 0;
  void *host = malloc(bytes);
  if (!host) die("out of memory");
  memset(host, byte, bytes);
  ClMem mem =
      cl.api.CreateBuffer(cl.context, (uint64_t)(CL_READ_WRITE | CL_COPY_HOST), bytes, host, &code);
  free(host);
  if (!mem) die("the device is out of memory");
  return mem;
}

typedef struct Launch {
  ClKernel kernel;
  size_t global[2], local[2];
} Launch;

static void set(ClKernel kernel, uint32_t i, size_t size, const void *value) {
  if (cl.api.SetKernelArg(kernel, i, size, value)) die("an argument is refused");
}

/* Seconds of a kernel over all weights: of the device's clock, and in the queue. */
static void measure(const Launch *l, const ClMem *w, int buffers, double *device, double *queue) {
  *device = *queue = 1e9;
  for (int repeat = 0; repeat < REPEATS; repeat++) {
    double total = 0, begin = seconds();
    ClEvent event[MOST_BUFFERS];
    for (int i = 0; i < buffers; i++) {
      set(l->kernel, 0, sizeof w[i], &w[i]);
      if (cl.api.EnqueueNDRangeKernel(cl.queue, l->kernel, 2, NULL, l->global, l->local, 0, NULL,
                                      &event[i]))
        die("a kernel does not run");
    }
    if (cl.api.Finish(cl.queue)) die("a kernel failed");
    double wall = (seconds() - begin) / buffers;
    for (int i = 0; i < buffers; i++) {
      uint64_t from = 0, to = 0;
      profiling(event[i], COMMAND_START, sizeof from, &from, NULL);
      profiling(event[i], COMMAND_END, sizeof to, &to, NULL);
      total += 1e-9 * (double)(to - from);
      release_event(event[i]);
    }
    if (total / buffers < *device) *device = total / buffers;
    if (wall < *queue) *queue = wall;
  }
}

static Launch product(int which, int32_t M, int32_t N, int32_t K) {
  const bc_cl_kernel *k = &bc_cl_kernels[which];
  int32_t KB = (int32_t)bc_ceil_div(K, 16), zero = 0;
  Launch l = {.kernel = cl.kernel[which]};
  ClMem q = device_buffer((size_t)M * KB * 16, 1), sums = device_buffer((size_t)M * 4, 0);
  ClMem s = device_buffer((size_t)M * 4, 1), scale = device_buffer((size_t)N * 4, 1);
  ClMem y = device_buffer((size_t)M * N * 4, 0), mem[] = {q, sums, s, scale, s, s, y};
  int32_t whole[] = {N, M, KB, zero, zero, zero};
  for (uint32_t i = 0; i < 7; i++) set(l.kernel, i + 1, sizeof mem[i], &mem[i]);
  for (uint32_t i = 0; i < 6; i++) set(l.kernel, i + 8, sizeof whole[i], &whole[i]);
  for (int axis = 0; axis < 2; axis++) l.local[axis] = (size_t)k->items[axis];
  l.global[0] = (size_t)bc_ceil_div(N, k->rows[0]) * l.local[0];
  l.global[1] = (size_t)bc_ceil_div(M, k->rows[1]) * l.local[1];
  return l;
}

static Launch reading(size_t bytes) {
  int32_t code = 0, count = (int32_t)(bytes / 16);
  const char *text = READ;
  ClProgram program = cl.api.CreateProgramWithSource(cl.context, 1, &text, NULL, &code);
  if (!program || cl.api.BuildProgram(program, 1, &cl.device, "", NULL, NULL))
    die("no read kernel");
  Launch l = {.kernel = cl.api.CreateKernel(program, "read_all", &code), .local = {256, 1}};
  ClMem out = device_buffer(4, 0);
  /* Four loads an item, in flight together. */
  l.global[0] = (size_t)bc_ceil_div(count, 4 * 256) * 256;
  l.global[1] = 1;
  set(l.kernel, 1, sizeof out, &out);
  set(l.kernel, 2, sizeof count, &count);
  return l;
}

static void shape(int32_t N, int32_t K) {
  size_t bytes = (size_t)(bc_ceil_div(N, 16) * bc_ceil_div(K, 16) * 64);
  ClMem w[MOST_BUFFERS];
  int buffers = (int)((size_t)MEGABYTES * 1000000 / bytes) + 1;
  double floor[2], gemv[2], gemm[2];
  if (buffers > MOST_BUFFERS) buffers = MOST_BUFFERS;
  for (int i = 0; i < buffers; i++) w[i] = device_buffer(bytes, 0x55 + i % 2);
  Launch read = reading(bytes), one = product(CLK_GEMV, 1, N, K);
  measure(&read, w, buffers, &floor[0], &floor[1]);
  measure(&one, w, buffers, &gemv[0], &gemv[1]);
  Launch many = product(CLK_GEMM, ROWS, N, K);
  int few = buffers < 16 ? buffers : 16;
  measure(&many, w, few, &gemm[0], &gemm[1]);
  double gb = (double)bytes * 1e-9, operations = 2.0 * N * K * ROWS * 1e-12;
  printf("| %dx%d | %.2f (%.0f) | %.2f (%.0f) | %.0f %% | %.2f | %.2f | %.1f |\n", N, K,
         floor[0] * 1e6, gb / floor[0], gemv[0] * 1e6, gb / gemv[0], 100 * floor[0] / gemv[0],
         floor[1] * 1e6, gemv[1] * 1e6, operations / gemm[0]);
  fflush(stdout);
  for (int i = 0; i < buffers; i++) cl.api.ReleaseMemObject(w[i]);
}

int main(int count, char **argument) {
  static const int32_t shapes[][2] = {
      {2560, 2560}, {3840, 2560}, {2560, 6912}, {13824, 2560}, {6912, 2560}};
  int32_t code = 0;
  size_t most = sizeof shapes / sizeof *shapes;
  if (count > 1) most = (size_t)atoi(argument[1]);
  if (bc_cl_open(&cl)) die("no device");
  cl.queue = cl.api.CreateCommandQueue(cl.context, cl.device, PROFILING, &code);
  if (!cl.queue) die("no queue that profiles");
  *(void **)&profiling = dlsym(cl.library, "clGetEventProfilingInfo");
  *(void **)&release_event = dlsym(cl.library, "clReleaseEvent");
  printf("%s, driver %s, dot product %d, %s memory, zero copy %s\n", cl.name, cl.driver, cl.dot,
         cl.unified ? "shared" : "own", cl.zero_copy ? "yes" : "no");
  printf("One row, us (GB/s) by the device's clock; queue: us a launch of many; %d rows: TOPS.\n\n",
         ROWS);
  printf("| N x K | read | gemv | share | read, queue | gemv, queue | %d rows |\n", ROWS);
  printf("|---|---|---|---|---|---|---|\n");
  for (size_t i = 0; i < most; i++) shape(shapes[i][0], shapes[i][1]);
  return 0;
}
