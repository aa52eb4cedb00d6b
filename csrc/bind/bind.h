// One function per floor; each adds its names to the module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace qcore::bind {

namespace py = pybind11;

void bind_quant(py::module_& module);
void bind_kernels(py::module_& module);
void bind_activations(py::module_& module);
void bind_calib(py::module_& module);
void bind_text(py::module_& module);
void bind_solve(py::module_& module);
void bind_model(py::module_& module);

}  // namespace qcore::bind
