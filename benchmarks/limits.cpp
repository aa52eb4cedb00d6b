// What the machine can do at most: how fast its memory is read, how fast each kind of
// multiplication runs.
//
// Compiled by limits.py for the CPU at hand. Rates are those of loops that do nothing else:
// registers only for the peaks, one sequential stream a thread for the reads. One operation is one
// multiplication or one addition.
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <sys/mman.h>

namespace {

constexpr int kLanes = 16;  // of 32 bits, in 64 bytes
constexpr int kAccumulators =
    16;  // independent sums: more than latency times issue width on any x86-64
constexpr size_t kHugePage = size_t{2} << 20;

typedef float Floats __attribute__((vector_size(64)));
typedef int64_t Words __attribute__((vector_size(64)));

// Runs `step` on kAccumulators independent accumulators, so often in each of `threads` threads.
template <typename T, typename Step>
double run(int threads, int64_t rounds, double operations_a_step, Step step) {
#pragma omp parallel num_threads(threads)
  {
    T sums[kAccumulators];
    for (int i = 0; i < kAccumulators; ++i) std::memset(&sums[i], 0, sizeof(T));
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
      for (int i = 0; i < kAccumulators; ++i) sums[i] = step(sums[i]);
    }
    for (int i = 0; i < kAccumulators; ++i) asm volatile("" ::"m"(sums[i]));
  }
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
  int64_t folded = 0;
#pragma omp parallel num_threads(threads) reduction(^ : folded)
  {
    const auto* line =
        static_cast<const Words*>(memory) + lines * static_cast<size_t>(omp_get_thread_num());
    Words sums[kUnrolled];
    std::memset(sums, 0, sizeof sums);
    for (size_t i = 0; i + kUnrolled <= lines; i += kUnrolled) {
#pragma GCC unroll 8
      for (size_t u = 0; u < kUnrolled; ++u) sums[u] |= line[i + u];
    }
    for (size_t u = 0; u < kUnrolled; ++u) {
      for (size_t i = 0; i < sizeof(Words) / 8; ++i) folded ^= sums[u][i];
    }
  }
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
