// The functions of the floor `solve`, as Python sees them.
#include "bind/bind.h"

namespace qcore::bind {

void bind_solve(py::module_& /*module*/) {}

}  // namespace qcore::bind
