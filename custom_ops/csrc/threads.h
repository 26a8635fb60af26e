/* The work of one call on ONNX Runtime's threads. */
#ifndef BITCOMPILE_THREADS_H
#define BITCOMPILE_THREADS_H

#include "ops.h"

typedef void bc_task_fn(void *job, size_t i);

enum { BC_MOST_PHASES = 4, BC_MOST_TASKS = 256 };

typedef struct Phase { /* tasks that begin when those of the phase before have ended */
  bc_task_fn *task;
  void *job;
  int64_t count; /* up to BC_MOST_TASKS */
  /* The i-th cache line that a task, or one soon after it, will read and no earlier phase writes;
   * NULL after the last. */
  const void *(*ahead)(const void *job, int64_t task, int64_t i);
} Phase;

/* Runs all tasks of all phases, in the runtime's intra-op pool where there is more than one. */
BcStatus *bc_run_phases(const Kernel *k, BcContext *context, const Phase *phases, int count);

#endif
