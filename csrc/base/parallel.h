// Loops over several threads, and the only place that knows OpenMP.
//
// The caller cuts the work into items; an item is computed by one thread from start to end, so
// results never depend on the number of threads. Threads only decide who computes which item.
#pragma once

#include <cstdint>
#include <functional>

namespace qcore {

// Threads that parallel_for uses: set_threads' value, else QCORE_THREADS, else usable_cpus().
int num_threads();

// count >= 1. Throws ArgumentError otherwise.
void set_threads(int count);

// Called now and then (about every 50 ms) by the calling thread inside parallel_for; it throws to
// stop the loop. The binding installs one that looks for Ctrl-C. An empty function removes it.
void set_interrupt_poll(std::function<void()> poll);

// Runs the installed poll if about 50 ms have passed since the last time. For long serial loops.
void poll_interrupt();

// Calls body(i) once for each i in [0, count), in any order and on any thread. The first exception
// of a body stops the remaining items and is thrown to the caller. A call from inside a body runs
// serially. After a fork the child runs serially: libgomp's threads do not survive one.
void parallel_for(int64_t count, const std::function<void(int64_t)>& body);

// Cuts [0, total) into pieces of `step` and calls body(begin, end) for each.
void parallel_blocks(int64_t total, int64_t step,
                     const std::function<void(int64_t, int64_t)>& body);

}  // namespace qcore
