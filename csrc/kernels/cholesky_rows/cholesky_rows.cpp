#include "kernels/cholesky_rows/cholesky_rows.h"

#include "base/dispatch.h"
#include "base/error.h"
#include "kernels/cholesky_rows/cholesky_rows_backends.h"

namespace qcore::kernels {
namespace {

template <typename T>
using Update = void (*)(const CholeskyRowsArgs<T>&);
template <typename T>
using Eliminate = bool (*)(const CholeskyRowsArgs<T>&);

template <typename T>
BackendTable<Update<T>> updates() {
#if defined(__x86_64__)
  return {&cholesky_update_ref, &cholesky_update_avx2, &cholesky_update_avx512};
#else
  return {&cholesky_update_ref, nullptr, nullptr};
#endif
}

template <typename T>
BackendTable<Eliminate<T>> eliminations() {
#if defined(__x86_64__)
  return {&cholesky_eliminate_ref, &cholesky_eliminate_avx2, &cholesky_eliminate_avx512};
#else
  return {&cholesky_eliminate_ref, nullptr, nullptr};
#endif
}

template <typename T>
void check(const CholeskyRowsArgs<T>& args) {
  if (args.row_begin % kStripRows == 0 && args.row_end % kStripRows == 0 &&
      args.row_begin <= args.row_end) {
    return;
  }
  throw ArgumentError(message("cholesky_rows: rows ", args.row_begin, " to ", args.row_end,
                              " are not whole strips of ", kStripRows, "."));
}

}  // namespace

Backend cholesky_rows_backend(Backend wanted) { return updates<float>().resolve(wanted); }

void cholesky_update(const CholeskyRowsArgs<float>& args, Backend backend) {
  check(args);
  updates<float>()[backend](args);
}

void cholesky_update(const CholeskyRowsArgs<double>& args, Backend backend) {
  check(args);
  updates<double>()[backend](args);
}

bool cholesky_eliminate(const CholeskyRowsArgs<float>& args, Backend backend) {
  check(args);
  return eliminations<float>()[backend](args);
}

bool cholesky_eliminate(const CholeskyRowsArgs<double>& args, Backend backend) {
  check(args);
  return eliminations<double>()[backend](args);
}

}  // namespace qcore::kernels
