// Threads of the CPU backend.
//
// If an OpenMP runtime with the GNU entry point is in the process (PyTorch's is), its pool runs our tasks too: a pool
// of our own beside it would fight for the cores, because OpenMP workers spin for milliseconds after each region.
// Otherwise, and in a forked child, where an OpenMP pool that the parent used hangs, a small pool of our own does.
#pragma once

#include <cstdint>

#include "punica/context.h"

namespace punica::cpu {

// Threads to use for work that would take one thread about `nanoseconds`: one where starting others would cost more
// than it saves, else all that the context allows. Nothing in between: OpenMP ends and restarts threads when the size
// of the team changes.
int choose_num_threads(const Context& context, double nanoseconds);

namespace detail {
using Task = void (*)(const void* body, int64_t task);
void run_parallel(int num_threads, int64_t num_tasks, Task run, const void* body);
}  // namespace detail

// Calls body(task) once for every task in [0, num_tasks), on up to num_threads threads, the caller's included, and
// returns when all are done. Tasks are claimed in order, one at a time, so which thread runs a task differs from call
// to call: results must not depend on it. body must not throw. May be called from several threads at once.
template <class Body>
void parallel_for(int num_threads, int64_t num_tasks, const Body& body) {
  detail::run_parallel(
      num_threads, num_tasks, [](const void* b, int64_t task) { (*static_cast<const Body*>(b))(task); }, &body);
}

}  // namespace punica::cpu
