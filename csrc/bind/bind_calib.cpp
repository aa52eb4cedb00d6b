// The functions of the floor `calib`, as Python sees them.
#include "bind/bind.h"

namespace qcore::bind {

void bind_calib(py::module_& /*module*/) {}

}  // namespace qcore::bind
