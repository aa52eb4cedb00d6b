// The floating-point state in which bytes of an artifact are computed.
#pragma once

#include <cfenv>

namespace qcore {

// While it lives this thread rounds to nearest and keeps subnormal numbers, whatever another
// library has set; the old state comes back afterwards. One per body of a parallel loop: the state
// belongs to a thread.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&before_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t before_;
};

}  // namespace qcore
