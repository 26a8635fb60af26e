/* threads THREADS ROUNDS: random phases on threads that come at random times, some too late. Every
 * task must run once, and see what all tasks of the phase before wrote. */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SLOT = 274, MOST = 1024 };

static int threads;
static unsigned seed = 1;

typedef struct Loop {
  bc_task_fn *task;
  void *data;
  size_t count;
  _Atomic size_t next;
} Loop;

static void *work(void *opaque) {
  Loop *loop = opaque;
  for (size_t i; (i = atomic_fetch_add(&loop->next, 1)) < loop->count;) loop->task(loop->data, i);
  return NULL;
}

static void *late(void *opaque) {
  usleep((unsigned)(uintptr_t)pthread_self() / 4096 % 64);
  return work(opaque);
}

static BcStatus *parallel_for(BcContext *context, bc_task_fn *task, size_t count, size_t batches,
                              void *data) {
  Loop loop = {task, data, count, 0};
  pthread_t others[MOST];
  (void)context, (void)batches;
  for (int i = 1; i < threads; i++) pthread_create(&others[i], NULL, late, &loop);
  work(&loop);
  for (int i = 1; i < threads; i++) pthread_join(others[i], NULL);
  return NULL;
}

typedef struct Job { /* of one phase; counts are plain: a race between phases is one of these */
  const struct Job *before;
  int64_t count;
  int64_t seen[BC_MOST_TASKS]; /* sum over the phase before, as each task saw it */
  int runs[BC_MOST_TASKS];
} Job;

static void task(void *opaque, size_t i) {
  Job *job = opaque;
  job->runs[i]++;
  for (int64_t t = 0; job->before && t < job->before->count; t++)
    job->seen[i] += job->before->runs[t];
}

static const void *ahead(const void *job, int64_t task, int64_t i) {
  return i < 100 ? (const char *)job + task * 8 + i : NULL;
}

int main(int argc, char **argv) {
  static void *slots[SLOT + 1];
  static Job jobs[BC_MOST_PHASES];
  Kernel kernel = {.api = (const BcApi *)slots};
  if (argc != 3) return 2;
  threads = atoi(argv[1]);
  slots[SLOT] = (void *)parallel_for;
  for (int round = 0; round < atoi(argv[2]); round++) {
    Phase phases[BC_MOST_PHASES];
    int count = 1 + rand_r(&seed) % BC_MOST_PHASES;
    memset(jobs, 0, sizeof jobs);
    for (int p = 0; p < count; p++) {
      jobs[p].before = p ? &jobs[p - 1] : NULL;
      jobs[p].count = rand_r(&seed) % 3 ? 1 + rand_r(&seed) % BC_MOST_TASKS : 1;
      phases[p] = (Phase){task, &jobs[p], jobs[p].count, p % 2 ? ahead : NULL};
    }
    bc_run_phases(&kernel, NULL, phases, count);
    for (int p = 0; p < count; p++)
      for (int64_t t = 0; t < jobs[p].count; t++)
        if (jobs[p].runs[t] != 1 || jobs[p].seen[t] != (p ? jobs[p - 1].count : 0)) {
          printf("round %d, phase %d, task %d: %d runs, saw %d\n", round, p, (int)t,
                 jobs[p].runs[t], (int)jobs[p].seen[t]);
          return 1;
        }
  }
  return 0;
}
