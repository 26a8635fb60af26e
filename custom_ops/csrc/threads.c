/* Phases inside one parallel loop of the runtime's: a loop for each would wake and join the threads
 * each time, which costs as much as reading 100 KiB.
 *
 * Nobody waits for work that nobody has begun: a thread takes a task only when it is running, and
 * waits only for tasks that were taken. So the loop may get any number of threads, at any time. */
#include "threads.h"

#include <sched.h>
#include <stdatomic.h>
#include <string.h>

enum {
  MOST_MEMBERS = 64, /* iterations of the runtime's loop: at least the threads that it has */
  PATIENCE = 1 << 12,
};

typedef struct Progress {
  _Atomic int64_t ended;
  _Atomic uint8_t taken[BC_MOST_TASKS];
} Progress;

typedef struct Team {
  const Phase *phases;
  int count;
  int64_t members;
  Progress progress[BC_MOST_PHASES];
} Team;

static int ended(Team *team, int phase) {
  return atomic_load_explicit(&team->progress[phase].ended, memory_order_acquire) ==
         team->phases[phase].count;
}

/* A task that nobody has, the next one in a circle; -1 if there is none. A thread's tasks are thus
 * neighbours, so that what a kernel prefetches beyond one of them is read by the same thread. */
static int64_t take(Team *team, int phase, int64_t from) {
  int64_t count = team->phases[phase].count;
  for (int64_t i = 0; i < count; i++) {
    int64_t task = from + i < count ? from + i : from + i - count;
    _Atomic uint8_t *taken = &team->progress[phase].taken[task];
    if (!atomic_load_explicit(taken, memory_order_relaxed) &&
        !atomic_exchange_explicit(taken, 1, memory_order_relaxed))
      return task;
  }
  return -1;
}

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Until the phase has ended; meanwhile what `task` of the next one reads is fetched. */
static void await(Team *team, int phase, int64_t task) {
  const Phase *next = &team->phases[phase + 1];
  const void *line = NULL;
  int fetching = next->ahead && task >= 0;
  for (int64_t i = 0; !ended(team, phase); i++) {
    if (fetching && (line = next->ahead(next->job, task, i))) {
      __builtin_prefetch(line, 0, 2);
      continue;
    }
    fetching = 0;
    pause_briefly();
    /* With more threads than cores, the one that we wait for may need ours. */
    if (i % PATIENCE == PATIENCE - 1) sched_yield();
  }
}

static void member(void *opaque, size_t index) {
  Team *team = opaque;
  if (ended(team, team->count - 1)) return;
  for (int p = 0; p < team->count; p++) {
    const Phase *phase = &team->phases[p];
    int64_t task = take(team, p, (int64_t)index * phase->count / team->members), done = 0;
    if (p) await(team, p - 1, task);
    for (; task >= 0; task = take(team, p, task + 1 < phase->count ? task + 1 : 0), done++)
      phase->task(phase->job, (size_t)task);
    if (done) atomic_fetch_add_explicit(&team->progress[p].ended, done, memory_order_release);
  }
}

BcStatus *bc_run_phases(const Kernel *k, BcContext *context, const Phase *phases, int count) {
  Team team;
  int64_t most = 0;
  for (int p = 0; p < count; p++) most = bc_max64(most, phases[p].count);
  team.phases = phases;
  team.count = count;
  team.members = bc_min64(most, MOST_MEMBERS);
  memset(team.progress, 0, sizeof team.progress);
  if (team.members <= 1) {
    member(&team, 0);
    return NULL;
  }
  return ort_KernelContext_ParallelFor(k->api)(context, member, (size_t)team.members, 0, &team);
}
