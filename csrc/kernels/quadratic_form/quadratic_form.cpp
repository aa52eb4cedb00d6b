#include "kernels/quadratic_form/quadratic_form.h"

#include "base/dispatch.h"
#include "kernels/quadratic_form/quadratic_form_backends.h"

namespace qcore::kernels {
namespace {

using Function = void (*)(const QuadraticFormArgs&);

BackendTable<Function> table() {
#if defined(__x86_64__)
  return {&quadratic_form_ref, &quadratic_form_avx2, &quadratic_form_avx512};
#else
  return {&quadratic_form_ref, nullptr, nullptr};
#endif
}

}  // namespace

Backend quadratic_form_backend(Backend wanted) { return table().resolve(wanted); }

void quadratic_form(const QuadraticFormArgs& args, Backend backend) { table()[backend](args); }

}  // namespace qcore::kernels
