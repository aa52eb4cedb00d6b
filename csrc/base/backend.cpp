#include "base/backend.h"

#include <atomic>
#include <cstdlib>

#include "base/error.h"

namespace qcore {
namespace {

constexpr int kUnset = -1;
std::atomic<int> g_backend{kUnset};

bool cpu_has(Backend backend) {
  if (backend == Backend::kRef) return true;
#if defined(__x86_64__)
  // __builtin_cpu_supports asks CPUID and, by XGETBV, whether the system saves the wide registers.
  __builtin_cpu_init();
  if (backend == Backend::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

Backend parse(const std::string& name, const char* source) {
  std::string valid;
  for (const Backend backend : available_backends()) {
    if (name == backend_name(backend)) return backend;
    valid += (valid.empty() ? "" : ", ") + std::string(backend_name(backend));
  }
  throw DeviceError(message(source, " asks for backend \"", name,
                            "\", which this machine or build lacks. Use one of: ", valid, "."));
}

}  // namespace

const char* backend_name(Backend backend) {
  switch (backend) {
    case Backend::kRef:
      return "ref";
    case Backend::kAvx2:
      return "avx2";
    case Backend::kAvx512:
      return "avx512";
  }
  return "unknown";
}

std::vector<Backend> available_backends() {
  std::vector<Backend> found;
  for (const Backend backend : {Backend::kAvx512, Backend::kAvx2, Backend::kRef}) {
    if (cpu_has(backend)) found.push_back(backend);
  }
  return found;
}

Backend active_backend() {
  int backend = g_backend.load(std::memory_order_relaxed);
  if (backend == kUnset) {
    const char* forced = std::getenv("QCORE_BACKEND");
    backend = static_cast<int>(forced != nullptr && *forced != '\0' ? parse(forced, "QCORE_BACKEND")
                                                                    : available_backends().front());
    g_backend.store(backend);
  }
  return static_cast<Backend>(backend);
}

void force_backend(const std::string& name) {
  g_backend.store(name.empty() ? kUnset : static_cast<int>(parse(name, "force_backend")));
}

}  // namespace qcore
