// The functions of the floor `quant`, as Python sees them.
#include "base/error.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/bind_spec.h"
#include "quant/grid.h"
#include "quant/pack.h"

namespace qcore::bind {
namespace {

MatrixView<int32_t> words_of(py::array_t<int32_t>& array) {
  return matrix_view(array.mutable_data(), array.shape(0), array.shape(1));
}

MatrixView<uint8_t> codes_of(py::array_t<uint8_t>& array) {
  return matrix_view(array.mutable_data(), array.shape(0), array.shape(1));
}

void require_count(int64_t count, const char* name) {
  if (count < 0) throw ArgumentError(message(name, " is ", count, ", below 0."));
}

py::array_t<int32_t> pack_rows_bound(const py::array& codes, int bits) {
  const auto view = as_matrix<uint8_t>(codes, "codes");
  auto words = new_array<int32_t>({view.rows, packed_words(view.columns, bits)});
  const auto out = words_of(words);
  const py::gil_scoped_release unlocked;
  pack_rows(view, bits, out);
  return words;
}

py::array_t<int32_t> pack_columns_bound(const py::array& codes, int bits) {
  const auto view = as_matrix<uint8_t>(codes, "codes");
  auto words = new_array<int32_t>({packed_words(view.rows, bits), view.columns});
  const auto out = words_of(words);
  const py::gil_scoped_release unlocked;
  pack_columns(view, bits, out);
  return words;
}

py::array_t<uint8_t> unpack_rows_bound(const py::array& words, int bits, int64_t columns) {
  const auto view = as_matrix<int32_t>(words, "words");
  require_count(columns, "columns");
  auto codes = new_array<uint8_t>({view.rows, columns});
  const auto out = codes_of(codes);
  const py::gil_scoped_release unlocked;
  unpack_rows(view, bits, out);
  return codes;
}

py::array_t<uint8_t> unpack_columns_bound(const py::array& words, int bits, int64_t rows) {
  const auto view = as_matrix<int32_t>(words, "words");
  require_count(rows, "rows");
  auto codes = new_array<uint8_t>({rows, view.columns});
  const auto out = codes_of(codes);
  const py::gil_scoped_release unlocked;
  unpack_columns(view, bits, out);
  return codes;
}

py::array_t<float> dequantize_codes(const py::array& codes, const py::array& scales,
                                    const py::array& zeros) {
  const CodesView view = as_codes(codes, scales, zeros);
  auto out = new_array<float>({view.out_features, view.in_features});
  const py::gil_scoped_release nogil;
  dequantize(view.codes, view.scales, view.zeros, view.out_features, view.in_features, view.groups,
             out.mutable_data());
  return out;
}

}  // namespace

void bind_quant(py::module_& module) {
  module.def("pack_rows", &pack_rows_bound, py::arg("codes"), py::arg("bits"),
             "Codes (rows, columns) to int32 words (rows, ceil(columns * bits / 32)).");
  module.def("pack_columns", &pack_columns_bound, py::arg("codes"), py::arg("bits"),
             "Codes (rows, columns) to int32 words (ceil(rows * bits / 32), columns).");
  module.def("unpack_rows", &unpack_rows_bound, py::arg("words"), py::arg("bits"),
             py::arg("columns"), "The inverse of pack_rows.");
  module.def("unpack_columns", &unpack_columns_bound, py::arg("words"), py::arg("bits"),
             py::arg("rows"), "The inverse of pack_columns.");
  module.def("dequantize", &dequantize_codes, py::arg("codes"), py::arg("scales"), py::arg("zeros"),
             "scale · (code - zero) in float32.");
}

}  // namespace qcore::bind
