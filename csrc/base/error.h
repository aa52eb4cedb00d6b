// The kinds of failure the core reports. Each becomes one Python exception (bind/module.cpp).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace qcore {

// A shape, a range or a size that the called function cannot take.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A dtype, a memory layout or a read-only output.
struct DtypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Arithmetic that has no useful answer: a Hessian that is not positive definite, NaN in statistics.
struct NumericalError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// No such backend or device in this build or on this machine.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Joins its arguments into one message: message("in_features is ", n, ".").
template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace qcore
