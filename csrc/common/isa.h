// The instruction sets that the CPU halves have loops for, chosen at run time.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"

namespace sphinx {

enum class Isa : uint8_t { plain, avx2, avx512 };
constexpr const char* kIsaNames[] = {"plain", "avx2", "avx512"};

// The most this processor has: avx2 means AVX2, FMA and F16C; avx512 means F, BW, DQ and VL beside them.
inline Isa best_isa() {
#ifdef SPHINX_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx2 ? avx512 ? Isa::avx512 : Isa::avx2 : Isa::plain;
  }();
  return best;
#else
  return Isa::plain;
#endif
}

// By name; none means the best.
inline Isa checked_isa(const std::optional<std::string>& name) {
  if (!name) return best_isa();
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
    if (*name == kIsaNames[i]) return static_cast<Isa>(i);
  }
  throw std::invalid_argument(
      concat("isa: expected plain to ", kIsaNames[static_cast<int>(best_isa())], " on this processor, got ", *name));
}

// The loops of a room for `isa`: `all` holds those that are in this build, in the order of Isa.
template <class Rows, size_t N>
const Rows& loops_for(Isa isa, const Rows& (*const (&all)[N])()) {
  check(static_cast<size_t>(isa) < N, "isa: not in this build");
  return all[static_cast<size_t>(isa)]();
}

}  // namespace sphinx
