#include "kernels/quadratic_form/quadratic_form_backends.h"

namespace qcore::kernels {
namespace {

constexpr int64_t kStripRows = 16;

template <typename T>
void rows_one_by_one(const QuadraticFormArgs<T>& args) {
  for (int64_t s = 0; s < args.n_strips; ++s) {
    for (int64_t lane = 0; lane < kStripRows; ++lane) {
      const T* d = args.rows + s * args.n * kStripRows + lane;
      double total = 0.0;
      for (int64_t j = 0; j < args.n; ++j) {
        T sum = 0;
        for (int64_t i = 0; i < j; ++i) sum += d[i * kStripRows] * args.h[i * args.h_stride + j];
        const T dj = d[j * kStripRows];
        total += static_cast<double>(dj * (dj * args.h[j * args.h_stride + j] + sum * T(2)));
      }
      args.out[s * kStripRows + lane] = total;
    }
  }
}

}  // namespace

void quadratic_form_ref(const QuadraticFormArgs<float>& args) { rows_one_by_one(args); }
void quadratic_form_ref(const QuadraticFormArgs<double>& args) { rows_one_by_one(args); }

}  // namespace qcore::kernels
