// csrc/attention/amx.h on any processor, by Intel's pseudo-code for palette 1. Found before the other one, whose
// instructions need AMX. What would be a fault there is an exception here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace sphinx::attention {
namespace amx {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

struct TileRegister {
  int rows = 0, bytes = 0;  // of a row
  alignas(64) uint8_t data[kMostRows][kMostBytes] = {};
};

struct State {
  int palette = 0;
  TileRegister tiles[kTiles];
  int64_t products = 0;
  // Each sum over one tile is two chains of its own, over the even and the odd elements, as in the manual of the
  // instruction; or one chain that goes on from what is there, as in the guide to the intrinsics.
  bool one_chain = false;
};
inline thread_local State state;

inline void expect(bool fine, const char* what) {
  if (!fine) throw std::logic_error(what);
}

inline void release() {
  state.palette = 0;
  for (TileRegister& tile : state.tiles) tile = {};
}

inline void configure(const void* config) {
  uint8_t bytes[64];
  std::memcpy(bytes, config, sizeof(bytes));
  release();
  expect(bytes[0] <= 1, "config: palette");
  if (bytes[0] == 0) return;
  for (int i = 1; i < 16; ++i) expect(bytes[i] == 0, "config: first row or reserved bytes");
  for (int i = 0; i < 16; ++i) {
    const int own_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8, rows = bytes[48 + i];
    expect(i < kTiles || (own_bytes == 0 && rows == 0), "config: more than eight tiles");
    expect(rows <= kMostRows && own_bytes <= kMostBytes, "config: a tile that is too large");
    expect((rows == 0) == (own_bytes == 0), "config: rows without bytes, or the other way round");
    if (i < kTiles) state.tiles[i].rows = rows, state.tiles[i].bytes = own_bytes;
  }
  state.palette = 1;
}

inline TileRegister& used(int tile) {
  expect(state.palette == 1, "tiles are not configured");
  expect(tile >= 0 && tile < kTiles && state.tiles[tile].rows > 0, "a tile that is not configured");
  return state.tiles[tile];
}

template <int kTo>
void zero() {
  std::memset(used(kTo).data, 0, sizeof(TileRegister::data));
}

template <int kTo>
void load(const void* from, int64_t step) {
  TileRegister& to = used(kTo);
  zero<kTo>();
  for (int row = 0; row < to.rows; ++row)
    std::memcpy(to.data[row], static_cast<const char*>(from) + row * step, to.bytes);
}

template <int kFrom>
void store(void* to, int64_t step) {
  const TileRegister& from = used(kFrom);
  for (int row = 0; row < from.rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * step, from.data[row], from.bytes);
}

inline float flushed(float value) {
  return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

inline float element(const uint8_t* row, int i) {  // bfloat16
  const uint32_t bits = static_cast<uint32_t>(row[2 * i] | row[2 * i + 1] << 8) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return flushed(value);
}

template <int kTo, int kLeft, int kRight>
void multiply_add() {
  TileRegister& to = used(kTo);
  const TileRegister &left = used(kLeft), &right = used(kRight);
  expect(kTo != kLeft && kTo != kRight && kLeft != kRight, "product: a tile twice");
  expect(to.bytes % 4 == 0 && left.bytes % 4 == 0 && right.bytes % 4 == 0, "product: broken words");
  expect(to.rows == left.rows && to.bytes == right.bytes && left.bytes / 4 == right.rows, "product: shapes");
  ++state.products;
  float elements[kMostRows][2 * kMostRows];  // of `right`
  for (int k = 0; k < right.rows; ++k) {
    for (int i = 0; i < right.bytes / 2; ++i) elements[k][i] = element(right.data[k], i);
  }
  const bool one_chain = state.one_chain;
  for (int m = 0; m < to.rows; ++m) {
    float own[kMostRows], even[kMostRows] = {}, odd[kMostRows] = {};
    std::memcpy(own, to.data[m], sizeof(own));
    for (int k = 0; k < left.bytes / 4; ++k) {
      const float first = element(left.data[m], 2 * k), second = element(left.data[m], 2 * k + 1);
      for (int n = 0; n < to.bytes / 4; ++n) {
        if (one_chain) {
          own[n] = flushed(std::fma(first, elements[k][2 * n], flushed(own[n])));
          own[n] = flushed(std::fma(second, elements[k][2 * n + 1], own[n]));
        } else {
          even[n] = flushed(std::fma(first, elements[k][2 * n], even[n]));
          odd[n] = flushed(std::fma(second, elements[k][2 * n + 1], odd[n]));
        }
      }
    }
    for (int n = 0; n < to.bytes / 4 && !one_chain; ++n) own[n] = flushed(flushed(own[n]) + flushed(even[n] + odd[n]));
    std::memcpy(to.data[m], own, to.bytes);
  }
}

}  // namespace amx
}  // namespace sphinx::attention
