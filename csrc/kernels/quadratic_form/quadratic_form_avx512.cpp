#include "kernels/lanes_avx512.h"
// The body is written on the lanes above.
#include "kernels/quadratic_form/quadratic_form_body.h"

namespace qcore::kernels {

void quadratic_form_avx512(const QuadraticFormArgs& args) { quadratic_form_strips(args); }

}  // namespace qcore::kernels
