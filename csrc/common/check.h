// Throwing checks. A message names the argument, what was expected and what came.
// invalid_argument becomes Python's ValueError, TypeError its TypeError, runtime_error its RuntimeError (module.cpp).
#pragma once

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sphinx {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The parts are only joined when the check fails.
template <class... Parts>
inline void check(bool ok, const Parts&... parts) {
  if (!ok) throw std::invalid_argument(concat(parts...));
}

template <class... Parts>
inline void check_type(bool ok, const Parts&... parts) {
  if (!ok) throw TypeError(concat(parts...));
}

// a * b and a + b of extents, which are never negative; `what` is named when the result leaves int64.
inline int64_t checked_mul(int64_t a, int64_t b, const char* what) {
  check(a == 0 || b <= std::numeric_limits<int64_t>::max() / a, what, ": ", a, " * ", b, " overflows 64 bits");
  return a * b;
}

inline int64_t checked_add(int64_t a, int64_t b, const char* what) {
  check(b <= std::numeric_limits<int64_t>::max() - a, what, ": ", a, " + ", b, " overflows 64 bits");
  return a + b;
}

}  // namespace sphinx
