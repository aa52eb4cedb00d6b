#include "base/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <utility>

#include "base/cpu_count.h"
#include "base/error.h"

namespace qcore {
namespace {

constexpr auto kPollPeriod = std::chrono::milliseconds(50);

std::atomic<int> g_threads{0};
std::atomic<bool> g_forked_child{false};
std::function<void()> g_poll;  // written by set_interrupt_poll before any loop runs
std::atomic<int64_t> g_last_poll{0};

int64_t now_ticks() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

void mark_forked_child() { g_forked_child.store(true); }

int default_threads() {
  if (const char* text = std::getenv("QCORE_THREADS")) {
    char* end = nullptr;
    const long value = std::strtol(text, &end, 10);
    if (end == text || *end != '\0' || value < 1 || value > 4096) {
      throw ArgumentError(message("QCORE_THREADS is \"", text,
                                  "\". Set it to a whole number from 1 to 4096, or unset it."));
    }
    return static_cast<int>(value);
  }
  return usable_cpus();
}

}  // namespace

int num_threads() {
  int threads = g_threads.load();
  if (threads == 0) {
    threads = default_threads();
    g_threads.store(threads);
  }
  return threads;
}

void set_threads(int count) {
  if (count < 1) {
    throw ArgumentError(message("set_threads: count is ", count, ". Use 1 or more."));
  }
  g_threads.store(count);
}

void set_interrupt_poll(std::function<void()> poll) { g_poll = std::move(poll); }

void poll_interrupt() {
  if (!g_poll) return;
  const int64_t now = now_ticks();
  const int64_t period =
      std::chrono::duration_cast<std::chrono::steady_clock::duration>(kPollPeriod).count();
  if (now - g_last_poll.load(std::memory_order_relaxed) < period) return;
  g_last_poll.store(now, std::memory_order_relaxed);
  g_poll();
}

void parallel_for(int64_t count, const std::function<void(int64_t)>& body) {
  static const int registered = pthread_atfork(nullptr, nullptr, mark_forked_child);
  (void)registered;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), count));
  if (threads <= 1 || omp_in_parallel() != 0 || g_forked_child.load()) {
    const bool outermost = omp_in_parallel() == 0;
    for (int64_t i = 0; i < count; ++i) {
      body(i);
      if (outermost) poll_interrupt();
    }
    return;
  }
  std::atomic<bool> stop{false};
  std::exception_ptr first;
  std::mutex first_mutex;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    if (stop.load(std::memory_order_relaxed)) continue;
    try {
      body(i);
      if (omp_get_thread_num() == 0) poll_interrupt();
    } catch (...) {
      const std::lock_guard<std::mutex> lock(first_mutex);
      if (!first) first = std::current_exception();
      stop.store(true);
    }
  }
  if (first) std::rethrow_exception(first);
}

void parallel_blocks(int64_t total, int64_t step,
                     const std::function<void(int64_t, int64_t)>& body) {
  const int64_t blocks = (total + step - 1) / step;
  parallel_for(blocks, [&](int64_t block) {
    const int64_t begin = block * step;
    body(begin, std::min(total, begin + step));
  });
}

}  // namespace qcore
