// The functions of the floor `quant`, as Python sees them.
#include "bind/bind.h"

namespace qcore::bind {

void bind_quant(py::module_& /*module*/) {}

}  // namespace qcore::bind
