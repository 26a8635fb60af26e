/* A stand-in for libcuda.so.1 whose one GPU runs some kernels, thread by thread, on this CPU.
 *
 * The threads of a block are coroutines that run in random order until they wait. Copies into
 * shared memory land as late as they can, the kernel before ends when nobody can go on without it,
 * and memory is full of rubbish before. What hardware may reorder between two barriers is not
 * seen. `kernels.inc` holds the kernels' generated text and `entries`; here are the functions that
 * they call, of CUDA and of prelude.cuh. A mistake ends the process with one line. */
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <vector>

typedef unsigned char uchar;
typedef unsigned int uint;
using std::max;
using std::min;

namespace {

/* ---- a block --------------------------------------------------------------------------------- */

enum { STACK = 1 << 16, RUBBISH = 0xA5, ROOM = 1 << 18, MARGIN = 1 << 16, WARP = 32 };
enum { FLOAT = 1, BFLOAT16 = 16 };

struct Thread {
  ucontext_t context;
  std::function<bool()> ready;
  bool done, may_read; /* what the kernel before wrote */
};
struct Meeting {
  int arrived, past, threads;
};
struct Exchange {
  uint64_t values[WARP];
  int arrived, past, to_leave;
};
struct Copy {
  void *to;
  const void *from;
  size_t bytes;
  bool landed;
};

std::vector<Thread> threads;
std::map<int, Meeting> meetings;
std::map<int, Exchange> exchanges;   /* by warp */
std::map<const void *, Copy> copies; /* by their barrier */
std::map<uchar *, size_t> arrays;    /* the block's, by where they begin */
std::vector<uchar> stacks;
alignas(128) uchar memory[MARGIN + ROOM + MARGIN];
uchar *const dynamic = memory + MARGIN;
ucontext_t scheduler;
std::minstd_rand chance(1);
std::function<void()> kernel;
size_t dynamic_bytes;
int current;
bool earlier_ended, overlapping; /* the kernel before */

[[noreturn]] void wrong(const char *what) {
  printf("%s (thread %d)\n", what, current);
  fflush(stdout);
  _Exit(3);
}

void wait_for(std::function<bool()> ready) {
  threads[current].ready = ready;
  while (!ready()) swapcontext(&threads[current].context, &scheduler);
  threads[current].ready = nullptr;
}

void start() {
  kernel();
  threads[current].done = true;
  swapcontext(&threads[current].context, &scheduler);
}

void run_block(int count) {
  threads.assign(count, Thread());
  meetings.clear(), exchanges.clear(), copies.clear(), arrays.clear();
  earlier_ended = !overlapping;
  memset(memory, RUBBISH, sizeof memory);
  stacks.resize((size_t)count * STACK);
  std::vector<int> order(count);
  for (int i = 0; i < count; i++) {
    Thread &t = threads[order[i] = i];
    t.may_read = earlier_ended;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = &stacks[(size_t)i * STACK];
    t.context.uc_stack.ss_size = STACK;
    makecontext(&t.context, start, 0);
  }
  for (int left = count; left;) {
    bool moved = false;
    std::shuffle(order.begin(), order.end(), chance);
    for (int i : order) {
      Thread &t = threads[i];
      if (t.done || (t.ready && !t.ready())) continue;
      moved = true, current = i;
      swapcontext(&scheduler, &t.context);
      left -= t.done;
    }
    if (!moved && earlier_ended) wrong("all threads wait for one another");
    if (!moved) earlier_ended = true;
  }
  for (auto &copy : copies)
    if (!copy.second.landed) wrong("a block ended before its copy landed");
  for (size_t i = 0; i < MARGIN; i++)
    if (memory[i] != RUBBISH || dynamic[dynamic_bytes + i] != RUBBISH)
      wrong("written beyond the block's memory");
}

/* ---- CUDA ------------------------------------------------------------------------------------ */

struct Index {
  int x, y;
} blockIdx;
struct {
  struct {
    operator int() const { return current; }
  } x;
} threadIdx;

#define __global__
#define __launch_bounds__(...)
#define __maxnreg__(...)

uchar *dynamic_memory() { return dynamic; }
void spoil(void *array, size_t bytes) { /* what is declared is not set */
  if (arrays.emplace((uchar *)array, bytes).second) memset(array, RUBBISH, bytes);
}

void meet(int number, int count) {
  Meeting &m = meetings[number];
  if (m.arrived && m.threads != count) wrong("threads meet with different counts");
  m.threads = count;
  int before = m.past;
  if (++m.arrived == count) {
    m.arrived = 0;
    m.past++;
  }
  wait_for([&m, before] { return m.past != before; });
}
void __syncthreads() { meet(0, (int)threads.size()); }

template <class T>
std::vector<T> of_warp(T value) {
  Exchange &e = exchanges[current / WARP];
  wait_for([&e] { return !e.to_leave; });
  int before = e.past;
  memcpy(&e.values[current % WARP], &value, sizeof value);
  if (++e.arrived == WARP) {
    e.arrived = 0;
    e.to_leave = WARP;
    e.past++;
  }
  wait_for([&e, before] { return e.past != before; });
  e.to_leave--;
  std::vector<T> all(WARP);
  for (int i = 0; i < WARP; i++) memcpy(&all[i], &e.values[i], sizeof(T));
  return all;
}
void __syncwarp() { of_warp(0); }
int __shfl_sync(uint, int v, int lane) { return of_warp(v)[lane]; }
float __shfl_xor_sync(uint, float v, int distance, int) {
  int lane = current % WARP ^ distance;
  return of_warp(v)[lane];
}
int __reduce_max_sync(uint, int v) {
  std::vector<int> all = of_warp(v);
  return *std::max_element(all.begin(), all.end());
}
int __reduce_add_sync(uint, int v) {
  uint sum = 0;
  for (int one : of_warp(v)) sum += (uint)one;
  return (int)sum;
}

template <class To, class From>
To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
int __float_as_int(float v) { return as<int>(v); }
float __int_as_float(int v) { return as<float>(v); }
float __frcp_rn(float v) { return 1.0f / v; }
float __fdiv_rn(float a, float b) { return a / b; }
float __fsqrt_rn(float v) { return std::sqrt(v); }
int __float2int_rn(float v) {
  if (std::isnan(v)) return 0;
  return v >= 0x1p31f ? INT32_MAX : v < -0x1p31f ? INT32_MIN : (int)std::nearbyint(v);
}

/* ---- prelude.cuh ----------------------------------------------------------------------------- */

void bc_wait_for_earlier() {
  wait_for([] { return earlier_ended; });
  threads[current].may_read = true;
}
void bc_let_next_start() {}
void bc_meet(int count) { meet(1, count); }
void bc_meet_some(int count) { meet(2, count); }

void must_have_waited() {
  if (!threads[current].may_read) wrong("read before the kernel before has ended");
}
float bc_load(const void *p, int64_t i, int type) {
  must_have_waited();
  if (type == FLOAT) return ((const float *)p)[i];
  uint16_t v = ((const uint16_t *)p)[i];
  return type == BFLOAT16 ? as<float>((uint)v << 16) : (float)as<_Float16>(v);
}
void bc_load4(float *out, const void *p, int64_t i, int type) {
  for (int j = 0; j < 4; j++) out[j] = bc_load(p, i + j, type);
}
template <int COUNT>
void bc_load_narrow(float *out, const void *p, int64_t base, int first, int stride, int words,
                    int type) {
  for (int i = 0; i < COUNT; i++, first += stride)
    for (int j = 0; j < 4; j++)
      out[4 * i + j] = first < words ? bc_load(p, base + 4 * first + j, type) : 0;
}
template <int COUNT>
void bc_load_wide(float *out, const void *p, int64_t base, int first, int stride, int words) {
  bc_load_narrow<COUNT>(out, p, base, first, stride, words, FLOAT);
}
void bc_load_row4(float *out, const void *p, int64_t base, int first, int stride, int words,
                  int type) {
  bc_load_narrow<4>(out, p, base, first, stride, words, type);
}
int bc_load_int(const int *p, int64_t i) { return must_have_waited(), p[i]; }
void bc_load_int4(int *out, const void *p, int64_t byte) {
  must_have_waited();
  memcpy(out, (const char *)p + byte, 16);
}
uint bc_load_bits(const void *p, int64_t i, int type) { return as<uint>(bc_load(p, i, type)); }
float bc_from_bits(uint bits, int) { return as<float>(bits); }
void bc_load_weights(uint *out, const uint *p) { memcpy(out, p, 16); }
void bc_load_constant4(float *out, const float *p, int i) { memcpy(out, p + i, 16); }

uint64_t bc_element(const void *p, int64_t i, int type) {
  return (uint64_t)p + (uint64_t)i * (type == FLOAT ? 4 : 2);
}
void bc_store_to(uint64_t address, float v, int type) {
  uint16_t narrow = as<uint16_t>((_Float16)v);
  if (type == BFLOAT16) {
    uint bits = as<uint>(v);
    narrow = std::isnan(v) ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  memcpy((void *)address, type == FLOAT ? (void *)&v : (void *)&narrow, type == FLOAT ? 4 : 2);
}

uchar *shared_at(uint address, size_t bytes, size_t alignment) {
  if (address % alignment) wrong("shared memory read or written off its alignment");
  uchar *found = dynamic + (int)address;
  if (address + bytes <= dynamic_bytes) return found;
  for (auto [begin, size] : arrays)
    if (begin <= found && found + bytes <= begin + size) return found;
  wrong("beyond the block's memory");
}
uint bc_shared(const void *p) { return (uint)((const uchar *)p - dynamic); }
uint bc_now(uint v) { return v; }
void bc_clear4(int *p) { memset(shared_at(bc_shared(p), 16, 16), 0, 16); }
void bc_put4(int *p, const int *v) { memcpy(shared_at(bc_shared(p), 16, 16), v, 16); }
void bc_add_shared(int *p, int v) { *(int *)shared_at(bc_shared(p), 4, 4) += v; }
int bc_sum_of4(uint address) {
  int v[4];
  memcpy(v, shared_at(address, 16, 16), 16);
  return v[0] + v[1] + v[2] + v[3];
}
void bc_load_shared4(float *out, const float *p) {
  if ((uintptr_t)p % 16) wrong("shared memory read off its alignment");
  memcpy(out, p, 16);
}
void bc_store_shared4(float *p, const float *v) { memcpy(shared_at(bc_shared(p), 16, 16), v, 16); }
void bc_load_shared8(int *out, uint address) { memcpy(out, shared_at(address, 32, 16), 32); }
void bc_load_token(int *out, uint address) {
  std::vector<uint> rows = of_warp(address); /* lane 8 j has those of matrices j and j + 4 */
  for (int i = 0; i < 8; i++) {
    uint row = rows[i % 4 * 8 + current % WARP / 4] + i / 4 * 64;
    memcpy(out + i, shared_at(row, 16, 16) + current % 4 * 4, 4);
  }
}
void bc_store_shared(uint address, int v) { memcpy(shared_at(address, 4, 4), &v, 4); }
void bc_add_at(uint address, int v) { *(int *)shared_at(address, 4, 4) += v; }
void bc_load_shared_unit_if(uint *out, uint address, int wanted) {
  if (wanted) memcpy(out, shared_at(address, 16, 16), 16);
}

void bc_landing(const void *barrier) { copies[barrier] = {}; }
void bc_landing_fence() {}
void bc_fetch(void *to, const void *from, int64_t byte, int bytes, const void *barrier, int lane) {
  if (lane) return;
  if (!copies.count(barrier) || copies[barrier].to) wrong("a barrier not opened, or used twice");
  copies[barrier] = {shared_at(bc_shared(to), bytes, 16), (const char *)from + byte, (size_t)bytes};
}
void bc_landed(uint address) {
  const void *barrier = shared_at(address, 8, 8);
  wait_for([barrier] { return copies.count(barrier) && copies[barrier].to; });
  Copy &copy = copies[barrier];
  if (!copy.landed) memcpy(copy.to, copy.from, copy.bytes);
  copy.landed = true;
}

int bc_quantized(float v, float scale) { return max(-128, min(127, __float2int_rn(v * scale))); }
int bc_pack(int a, int b, int c, int d) {
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (int)((uint)d << 24);
}
int bc_quantized4(const float *v, float scale) {
  int q[4]; /* of finite values, or with a scale of 0 */
  for (int i = 0; i < 4; i++) q[i] = as<int>(v[i] * scale + 12582912.0f);
  return bc_pack(q[0], q[1], q[2], q[3]);
}
int bc_sum4(int word) {
  return (int8_t)word + (int8_t)(word >> 8) + (int8_t)(word >> 16) + (int8_t)(word >> 24);
}
void bc_dot16(int *sums, uint codes, int low, int high) {
  for (int field = 0; field < 4; field++)
    for (int byte = 0; byte < 4; byte++) {
      int code = codes >> 8 * byte & 3u << 2 * field;
      sums[field] += code * (int8_t)((field < 2 ? low : high) >> 8 * byte);
    }
}
float bc_reciprocal(float v) { return 1.0f / v; }
float bc_reciprocal_rms(float total, float K, float, float eps) {
  return 1.0f / std::sqrt(total / K + eps);
}
void bc_put_int(void *p, int64_t byte, int v) { memcpy((char *)p + byte, &v, 4); }

}  // namespace

struct Entry {
  const char *name;
  void (*call)(void **arguments);
};
#include "kernels.inc"

/* ---- the driver ------------------------------------------------------------------------------ */

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int) { return *device = 0, 0; }
int cuDeviceGetName(char *name, int, int) { return strcpy(name, "an emulated GPU"), 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
  enum { PROCESSORS = 16, MAJOR = 75, SHARED = 97 };
  *value = attribute == PROCESSORS ? 132
           : attribute == MAJOR    ? 9
           : attribute == SHARED   ? 232448
                                   : 0;
  return 0;
}
int cuCtxGetDevice(int *device) { return *device = 0, 0; }
int cuLibraryLoadData(void **library, ...) { return *library = library, 0; }
int cuLibraryGetKernel(void **kernel, void *, const char *name) {
  for (const Entry &entry : entries)
    if (!strcmp(entry.name, name)) return *kernel = (void *)&entry, 0;
  return *kernel = (void *)name, 0; /* a kernel that does nothing */
}
int cuKernelGetAttribute(int *value, int, void *, int) { return *value = 0, 0; }
int cuKernelSetAttribute(int, int, void *, int) { return 0; }
int cuLaunchKernelEx(const unsigned *config, void *function, void **arguments, void **) {
  const Entry *entry = std::find_if(std::begin(entries), std::end(entries),
                                    [function](const Entry &e) { return &e == function; });
  if (entry == std::end(entries)) return 0;
  dynamic_bytes = config[6]; /* CUlaunchConfig: grid, block, shared memory, and attributes' count */
  overlapping = config[12];
  if (dynamic_bytes > ROOM) wrong("more shared memory than there is");
  kernel = [entry, arguments] { entry->call(arguments); };
  for (unsigned y = 0; y < config[1]; y++)
    for (unsigned x = 0; x < config[0]; x++) {
      blockIdx = {(int)x, (int)y};
      run_block((int)config[3]);
    }
  return 0;
}
int cuGetErrorString(int, const char **text) { return *text = "an error", 0; }
}
