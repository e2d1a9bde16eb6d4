// The instruction sets that the CPU halves have loops for, chosen at run time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#ifdef SPHINX_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/check.h"

namespace sphinx {

enum class Isa : uint8_t { plain, avx2, avx512, amx };
constexpr const char* kIsaNames[] = {"plain", "avx2", "avx512", "amx"};

#ifdef SPHINX_AMX
// Tiles of bfloat16, which Linux lets a process use that has asked for them.
inline bool amx_granted() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kBFloat16) &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
inline bool amx_granted() {
  return false;
}
#endif

// The most this processor has: avx2 means AVX2, FMA and F16C; avx512 means F, BW, DQ and VL beside them; amx means
// tiles of bfloat16 beside those.
inline Isa best_isa() {
#ifdef SPHINX_X86
  static const Isa best = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx2 || !avx512) return avx2 ? Isa::avx2 : Isa::plain;
    return amx_granted() ? Isa::amx : Isa::avx512;
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

// The loops of a room for `isa`: `all` holds those it has, in the order of Isa; for a better one, the last.
template <class Rows, size_t N>
const Rows& loops_for(Isa isa, const Rows& (*const (&all)[N])()) {
  return all[std::min(static_cast<size_t>(isa), N - 1)]();
}

}  // namespace sphinx
