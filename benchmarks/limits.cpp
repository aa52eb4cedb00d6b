// What the machine can do at most: how fast its memory is read, how fast each kind of
// multiplication runs.
//
// Compiled by limits.py for the CPU at hand. Rates are those of loops that do nothing else:
// registers only for the peaks, one sequential stream a thread for the reads. One operation is one
// multiplication or one addition.
#include <immintrin.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

// A vector fills one register. Independent sums: more than latency times issue width, and with the
// two factors no more than there are registers, 32 or 16.
#ifdef __AVX512F__
constexpr int kVectorBytes = 64;
constexpr int kAccumulators = 16;
#else
constexpr int kVectorBytes = 32;
constexpr int kAccumulators = 12;
#endif
constexpr int kLanes = kVectorBytes / 4;  // of 32 bits
constexpr size_t kHugePage = size_t{2} << 20;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int64_t Words __attribute__((vector_size(kVectorBytes)));

// Runs body(index) in `threads` threads, each on a CPU of its own: a limit must not depend on where
// the system happens to put them. They are new ones, since the pool that the kernels share may not
// be pinned.
template <typename Body>
void in_threads(int threads, Body body) {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
  }
  std::vector<std::thread> workers;
  for (int index = 0; index < threads; ++index) {
    const int cpu = cpus[static_cast<size_t>(index) % cpus.size()];
    workers.emplace_back([=] {
      cpu_set_t own;
      CPU_ZERO(&own);
      CPU_SET(cpu, &own);
      sched_setaffinity(0, sizeof own, &own);
      body(index);
    });
  }
  for (std::thread& worker : workers) worker.join();
}

// Runs `step` on kAccumulators independent accumulators, so often in each of `threads` threads.
template <typename T, typename Step>
double run(int threads, int64_t rounds, double operations_a_step, Step step) {
  in_threads(threads, [=](int) {
    T sums[kAccumulators];
    for (int i = 0; i < kAccumulators; ++i) std::memset(&sums[i], 0, sizeof(T));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
      for (int i = 0; i < kAccumulators; ++i) sums[i] = step(sums[i]);
    }
    for (int i = 0; i < kAccumulators; ++i) asm volatile("" ::"m"(sums[i]));
  });
  return operations_a_step * kAccumulators * static_cast<double>(rounds) * threads;
}

}  // namespace

extern "C" {

// Memory in 2 MiB pages where the system grants them, every page touched. nbytes: a multiple of 2
// MiB. Never freed before the process ends.
void* limits_allocate(size_t nbytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, kHugePage, nbytes) != 0) return nullptr;
  madvise(memory, nbytes, MADV_HUGEPAGE);
  std::memset(memory, 1, nbytes);
  return memory;
}

// Reads all of `memory`, each thread its own part from front to back. Returns what was read,
// folded.
int64_t limits_read(const void* memory, size_t nbytes, int threads) {
  constexpr size_t kUnrolled = 8;
  const size_t lines = nbytes / sizeof(Words) / static_cast<size_t>(threads);
  std::atomic<int64_t> folded{0};
  in_threads(threads, [&folded, memory, lines](int index) {
    const auto* line = static_cast<const Words*>(memory) + lines * static_cast<size_t>(index);
    Words sums[kUnrolled];
    std::memset(sums, 0, sizeof sums);
    for (size_t i = 0; i + kUnrolled <= lines; i += kUnrolled) {
#pragma GCC unroll 8
      for (size_t u = 0; u < kUnrolled; ++u) sums[u] |= line[i + u];
    }
    int64_t own = 0;
    for (size_t u = 0; u < kUnrolled; ++u) {
      for (size_t i = 0; i < sizeof(Words) / 8; ++i) own ^= sums[u][i];
    }
    folded ^= own;
  });
  return folded;
}

// Each returns the operations that it did; 0 where the CPU lacks the instruction.

double limits_fp32(int threads, int64_t rounds) {
  const Floats a = Floats{} + 1.0f;
  const Floats b = Floats{} + 0.5f;
  return run<Floats>(threads, rounds, 2.0 * kLanes, [=](Floats sum) { return sum * b + a; });
}

double limits_bf16(int threads, int64_t rounds) {
#ifdef __AVX512BF16__
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  return run<__m512>(threads, rounds, 4.0 * kLanes,
                     [=](__m512 sum) { return _mm512_dpbf16_ps(sum, ones, ones); });
#else
  (void)threads, (void)rounds;
  return 0;
#endif
}

double limits_int8(int threads, int64_t rounds) {
#ifdef __AVX512VNNI__
  const __m512i ones = _mm512_set1_epi8(1);
  return run<__m512i>(threads, rounds, 8.0 * kLanes,
                      [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, ones, ones); });
#else
  (void)threads, (void)rounds;
  return 0;
#endif
}

}  // extern "C"
