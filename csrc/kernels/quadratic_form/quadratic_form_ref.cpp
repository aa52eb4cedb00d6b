#include <cmath>

#include "kernels/quadratic_form/quadratic_form_backends.h"

namespace qcore::kernels {

void quadratic_form_ref(const QuadraticFormArgs& args) {
  const PanelLayout layout{kFormGroup};
  for (int64_t lane = 0; lane < args.n_strips * kStripRows; ++lane) {
    const float* d = args.rows + lane / kStripRows * args.n * kStripRows + lane % kStripRows;
    double total = 0.0;
    for (int64_t j = 0; j < args.n; ++j) {
      float sum = 0.0f;
      for (int64_t i = 0; i < j; ++i) {
        sum = std::fma(d[i * kStripRows], args.h[layout.at(i, j)], sum);
      }
      const double dj = d[j * kStripRows];
      const double inner = std::fma(dj, args.h[layout.at(j, j)], 2.0 * sum);
      total = std::fma(dj, inner, total);
    }
    args.out[lane] = total;
  }
}

}  // namespace qcore::kernels
