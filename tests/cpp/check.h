// A test is a function; CHECK counts and prints what failed, with its place; main returns report().
#pragma once

#include <cmath>
#include <cstdio>

namespace qcore::test {

inline int& failures() {
  static int count = 0;
  return count;
}

inline int& checks() {
  static int count = 0;
  return count;
}

inline int report() {
  std::printf("%d passed, %d failed\n", checks() - failures(), failures());
  return failures() == 0 && checks() > 0 ? 0 : 1;
}

}  // namespace qcore::test

#define CHECK(condition)                                                        \
  do {                                                                          \
    ++qcore::test::checks();                                                    \
    if (!(condition)) {                                                         \
      ++qcore::test::failures();                                                \
      std::printf("%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
    }                                                                           \
  } while (0)

// NaN fails: the comparison is written as err <= tolerance.
#define CHECK_NEAR(value, expected, tolerance)                                                    \
  do {                                                                                            \
    ++qcore::test::checks();                                                                      \
    const double check_error =                                                                    \
        std::fabs(static_cast<double>(value) - static_cast<double>(expected));                    \
    if (!(check_error <= static_cast<double>(tolerance))) {                                       \
      ++qcore::test::failures();                                                                  \
      std::printf("%s:%d: |%s - %s| = %g, more than %g\n", __FILE__, __LINE__, #value, #expected, \
                  check_error, static_cast<double>(tolerance));                                   \
    }                                                                                             \
  } while (0)

#define CHECK_THROWS(expression, exception)                                                     \
  do {                                                                                          \
    ++qcore::test::checks();                                                                    \
    bool thrown = false;                                                                        \
    try {                                                                                       \
      (void)(expression);                                                                       \
    } catch (const exception&) {                                                                \
      thrown = true;                                                                            \
    }                                                                                           \
    if (!thrown) {                                                                              \
      ++qcore::test::failures();                                                                \
      std::printf("%s:%d: %s did not throw %s\n", __FILE__, __LINE__, #expression, #exception); \
    }                                                                                           \
  } while (0)
