// One table per kernel: the function for each backend, null where a backend has none of its own.
#pragma once

#include "base/backend.h"

namespace qcore {

template <typename Function>
struct BackendTable {
  Function ref = nullptr;   // always there
  Function avx2 = nullptr;  // null on machines and builds without it
  Function avx512 = nullptr;

  // The backend that `wanted` leads to here: the best one with a function that is not above it.
  Backend resolve(Backend wanted) const {
    if (wanted == Backend::kAvx512 && avx512 != nullptr) return Backend::kAvx512;
    if (wanted >= Backend::kAvx2 && avx2 != nullptr) return Backend::kAvx2;
    return Backend::kRef;
  }

  Function operator[](Backend wanted) const {
    switch (resolve(wanted)) {
      case Backend::kAvx512:
        return avx512;
      case Backend::kAvx2:
        return avx2;
      case Backend::kRef:
        break;
    }
    return ref;
  }
};

}  // namespace qcore
