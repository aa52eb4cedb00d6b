// Texts of the floor `calib`, as Python sees them.
#include <pybind11/stl.h>

#include <string_view>
#include <vector>

#include "base/parallel.h"
#include "bind/arrays.h"
#include "bind/bind.h"
#include "calib/near_duplicates.h"
#include "calib/text_features.h"

namespace qcore::bind {
namespace {

using calib::NearDuplicates;

// Views of bytes objects; they live as long as the list.
std::vector<std::string_view> views_of(const std::vector<py::bytes>& texts) {
  return {texts.begin(), texts.end()};
}

void add(NearDuplicates& self, const std::vector<py::bytes>& texts) {
  const std::vector<std::string_view> views = views_of(texts);
  const py::gil_scoped_release nogil;
  self.add(views);
}

py::array_t<int64_t> groups(const NearDuplicates& self, const py::array& ranks) {
  const int64_t* data = as_vector<int64_t>(ranks, "ranks", self.size());
  std::vector<int64_t> found;
  {
    const py::gil_scoped_release nogil;
    found = self.groups({data, data + self.size()});
  }
  return py::array_t<int64_t>(static_cast<py::ssize_t>(found.size()), found.data());
}

py::array_t<uint32_t> shingles(const py::bytes& text) {
  const std::vector<uint32_t> found = calib::shingles_of(std::string_view(text));
  return py::array_t<uint32_t>(static_cast<py::ssize_t>(found.size()), found.data());
}

py::array_t<int16_t> text_features(const std::vector<py::bytes>& texts) {
  const std::vector<std::string_view> views = views_of(texts);
  const auto count = static_cast<int64_t>(views.size());
  auto out = new_array<int16_t>({count, calib::kFeatures});
  int16_t* data = out.mutable_data();
  const py::gil_scoped_release nogil;
  parallel_for(count, [&](int64_t i) {
    calib::text_features(views[static_cast<size_t>(i)], data + i * calib::kFeatures);
  });
  return out;
}

}  // namespace

void bind_text(py::module_& module) {
  py::class_<NearDuplicates>(module, "NearDuplicates", "Finds texts that say nearly the same.")
      .def(py::init<uint64_t>(), py::arg("seed"))
      .def("add", &add, py::arg("texts"), "More texts: UTF-8, words parted by single spaces.")
      .def("groups", &groups, py::arg("ranks"), "The first member of each text's group.")
      .def_property_readonly("size", &NearDuplicates::size, "Texts that were added.");
  module.def("shingles", &shingles, py::arg("text"), "Hashes of a text's shingles, sorted.");
  module.def("text_features", &text_features, py::arg("texts"),
             "(n, 4096) int16: hashed character n-grams.");
}

}  // namespace qcore::bind
