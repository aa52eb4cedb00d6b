#include "kernels/quadratic_form/quadratic_form_lanes.h"

namespace qcore::kernels {

void quadratic_form_avx2(const QuadraticFormArgs<float>& args) { strips_one_by_one(args); }
void quadratic_form_avx2(const QuadraticFormArgs<double>& args) { strips_one_by_one(args); }

}  // namespace qcore::kernels
