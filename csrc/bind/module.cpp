// The compiled module qcore._core: private; the public face is python/qcore.
#include <pybind11/functional.h>

#include <exception>
#include <string>

#include "base/backend.h"
#include "base/error.h"
#include "base/parallel.h"
#include "bind/bind.h"

namespace qcore::bind {
namespace {

// Looks for Ctrl-C from inside a long loop. Python looks at signals in its main thread only, so
// elsewhere this is idle.
void raise_pending_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Raises the class of that name in qcore.errors. "CODE: text" gives the error that code, else it
// has the default one of its class.
void raise_as(const char* class_name, const std::exception& error) {
  const std::string text = error.what();
  const size_t end = text.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZ_");
  const bool coded = end != std::string::npos && end > 0 && text.compare(end, 2, ": ") == 0;
  const py::object type = py::module_::import("qcore.errors").attr(class_name);
  const py::object raised =
      coded ? type(text.substr(end + 2), py::arg("code") = text.substr(0, end)) : type(text);
  PyErr_SetObject(type.ptr(), raised.ptr());
}

void translate(std::exception_ptr pointer) {
  try {
    std::rethrow_exception(pointer);
  } catch (const ArgumentError& error) {
    raise_as("ArgumentError", error);
  } catch (const DtypeError& error) {
    raise_as("DtypeError", error);
  } catch (const NumericalError& error) {
    raise_as("NumericalError", error);
  } catch (const DeviceError& error) {
    raise_as("DeviceError", error);
  }
}

void bind_base(py::module_& module) {
  module.def("num_threads", &num_threads, "Threads that kernels use.");
  module.def("set_threads", &set_threads, py::arg("count"), "Sets the threads that kernels use.");
  module.def(
      "available_backends",
      [] {
        py::list names;
        for (const Backend backend : available_backends()) names.append(backend_name(backend));
        return names;
      },
      "Backends this machine can run, best first.");
  module.def(
      "active_backend", [] { return backend_name(active_backend()); }, "The backend in force.");
  module.def("force_backend", &force_backend, py::arg("name"),
             "Forces a backend; an empty name returns to the default.");
  module.attr("compiler") = __VERSION__;
}

}  // namespace
}  // namespace qcore::bind

PYBIND11_MODULE(_core, module) {
  using namespace qcore::bind;
  py::register_exception_translator(&translate);
  bind_base(module);
  bind_quant(module);
  bind_kernels(module);
  bind_activations(module);
  bind_calib(module);
  bind_text(module);
  bind_solve(module);
  bind_model(module);
  qcore::set_interrupt_poll(&raise_pending_signals);
}
