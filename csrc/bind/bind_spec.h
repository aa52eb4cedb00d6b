// A grid and its codes at the border, shared by the bindings of `quant` and `solve`.
#pragma once

#include <cstdint>
#include <string>

#include "bind/bind.h"
#include "quant/spec.h"

namespace qcore::bind {

// Throws ArgumentError for a bad bits, group_size or name of a dtype. group_size is positive here.
QuantSpec make_spec(int bits, int64_t group_size, bool symmetric, bool signed_scales,
                    const std::string& scale_dtype);

// C-contiguous codes (N, K) uint8, scales (N, G) float32, zeros (N, G) uint8.
struct CodesView {
  const uint8_t* codes;
  const float* scales;
  const uint8_t* zeros;
  int64_t out_features;
  int64_t in_features;
  int64_t group_size;
};
// Throws ArgumentError when G is not ceil(K / group_size).
CodesView as_codes(const py::array& codes, const py::array& scales, const py::array& zeros,
                   int64_t group_size);

// A C-contiguous (rows, columns) array; -1 for "any".
template <typename T>
const T* as_contiguous(const py::array& array, const char* name, int64_t rows, int64_t columns);

}  // namespace qcore::bind
