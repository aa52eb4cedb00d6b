// Which instruction set the kernels use. Found once at run time; QCORE_BACKEND or force_backend
// picks another.
#pragma once

#include <string>
#include <vector>

#include "base/backend_id.h"

namespace qcore {

const char* backend_name(Backend backend);

// What this machine can run, best first; always ends with kRef.
std::vector<Backend> available_backends();

// The backend in force: force_backend's, else QCORE_BACKEND's, else the best available one.
// Throws DeviceError, listing the valid names, when QCORE_BACKEND names one that this machine
// lacks.
Backend active_backend();

// An empty name returns to the default. Throws DeviceError for an unknown or missing backend.
void force_backend(const std::string& name);

}  // namespace qcore
