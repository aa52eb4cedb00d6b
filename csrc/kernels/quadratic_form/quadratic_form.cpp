#include "kernels/quadratic_form/quadratic_form.h"

#include "base/dispatch.h"
#include "kernels/quadratic_form/quadratic_form_backends.h"

namespace qcore::kernels {
namespace {

template <typename T>
using Function = void (*)(const QuadraticFormArgs<T>&);

template <typename T>
BackendTable<Function<T>> table() {
#if defined(__x86_64__)
  return {&quadratic_form_ref, &quadratic_form_avx2, &quadratic_form_avx512};
#else
  return {&quadratic_form_ref, nullptr, nullptr};
#endif
}

}  // namespace

Backend quadratic_form_backend(Backend wanted) { return table<float>().resolve(wanted); }

void quadratic_form(const QuadraticFormArgs<float>& args, Backend backend) {
  table<float>()[backend](args);
}

void quadratic_form(const QuadraticFormArgs<double>& args, Backend backend) {
  table<double>()[backend](args);
}

}  // namespace qcore::kernels
