// The functions of the floor `kernels`, as Python sees them.
#include "bind/bind.h"

namespace qcore::bind {

void bind_kernels(py::module_& /*module*/) {}

}  // namespace qcore::bind
