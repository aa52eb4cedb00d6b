// The functions of the floor `model`, as Python sees them.
#include "bind/bind.h"

namespace qcore::bind {

void bind_model(py::module_& /*module*/) {}

}  // namespace qcore::bind
