// The functions of the floor `quant`, as Python sees them.
#include <algorithm>
#include <string>

#include "base/error.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "bind/bind_spec.h"
#include "quant/grid.h"
#include "quant/nf4.h"
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
                                    const py::array& zeros, int64_t group_size) {
  const CodesView view = as_codes(codes, scales, zeros, group_size);
  auto out = new_array<float>({view.out_features, view.in_features});
  const py::gil_scoped_release nogil;
  dequantize(view.codes, view.scales, view.zeros, view.out_features, view.in_features,
             view.group_size, out.mutable_data());
  return out;
}

py::tuple quantize_nf4_bound(const py::array& weight, int64_t group_size,
                             const std::string& scale_dtype) {
  const float* data = as_contiguous<float>(weight, "weight", -1, -1);
  const int64_t rows = weight.shape(0);
  const int64_t columns = weight.shape(1);
  const QuantSpec spec = make_spec(kNf4Bits, group_size, false, false, scale_dtype);
  auto codes = new_array<uint8_t>({rows, columns});
  auto scales = new_array<float>({rows, spec.n_groups(columns)});
  auto zeros = new_array<uint8_t>({rows, spec.n_groups(columns)});
  std::fill_n(zeros.mutable_data(), zeros.size(), kNf4Zero);
  {
    const py::gil_scoped_release nogil;
    quantize_nf4(data, rows, columns, group_size, spec.scale_dtype, codes.mutable_data(),
                 scales.mutable_data());
  }
  return py::make_tuple(codes, scales, zeros);
}

py::array_t<float> dequantize_nf4_codes(const py::array& codes, const py::array& scales,
                                        const py::array& zeros, int64_t group_size) {
  const CodesView view = as_codes(codes, scales, zeros, group_size);
  auto out = new_array<float>({view.out_features, view.in_features});
  const py::gil_scoped_release nogil;
  dequantize_nf4(view.codes, view.scales, view.out_features, view.in_features, view.group_size,
                 out.mutable_data());
  return out;
}

py::array_t<float> nf4_table() {
  auto table = new_array<float>({kNf4Codes});
  std::copy_n(kNf4Table, kNf4Codes, table.mutable_data());
  return table;
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
             py::arg("group_size"), "scale · (code - zero) in float32.");
  module.def("nf4_table", &nf4_table, "The 16 values of NF4.");
  module.def("quantize_nf4", &quantize_nf4_bound, py::arg("weight"), py::arg("group_size"),
             py::arg("scale_dtype"), "(codes, scales, zeros) of the nearest NF4 values.");
  module.def("dequantize_nf4", &dequantize_nf4_codes, py::arg("codes"), py::arg("scales"),
             py::arg("zeros"), py::arg("group_size"),
             "scale · NF4 value in float32; zeros take no part.");
}

}  // namespace qcore::bind
