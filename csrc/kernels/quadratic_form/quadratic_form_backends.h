// What each backend of quadratic_form offers to quadratic_form.cpp.
#pragma once

#include "kernels/quadratic_form/quadratic_form.h"

namespace qcore::kernels {

void quadratic_form_ref(const QuadraticFormArgs& args);
void quadratic_form_avx2(const QuadraticFormArgs& args);
void quadratic_form_avx512(const QuadraticFormArgs& args);

}  // namespace qcore::kernels
