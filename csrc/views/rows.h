// The inner loops of the room views on the CPU: one set per instruction set, all with the same results bit for bit.
// rows_plain.cpp is the definition, rows_avx2.cpp and rows_avx512.cpp are fast; cpu.cpp picks a set at run time.
//
// Pixels between the passes are planar: a row is three planes (red, green, blue) of `plane` bytes, in `pitch` bytes.
#pragma once

#include <cstdint>

namespace sphinx::views {

constexpr int kGroup = 8;       // rows that horizontal() takes at once
constexpr int kSlack = 64;      // bytes that must be readable past the end of every row given to a loop
constexpr int kScratch = 64;    // bytes
constexpr int kPlaneUnit = 32;  // planes are a multiple of this, so are the outputs of the tables below

constexpr int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// One axis of a resize as the loops read it. A 23-bit weight w = 256 * high + low, both of which fit 16 bits; the two
// halves of neighbouring taps lie together, as the multiply-add of pairs reads them: [h0 h1 l0 l1] [h2 h3 l2 l3] ...
struct Taps {
  int out;                 // outputs, a multiple of kPlaneUnit; those past the end have no taps
  int stride;              // int16 from one output's weights to the next
  int longest;             // of the spans
  const int32_t* spans;    // [out / kPlaneUnit, 2] the pixels [low, high) that so many outputs read, low even
  const int32_t* first;    // [out] first pixel, even
  const int32_t* count;    // [out] taps; the weight past an odd count is 0
  const int16_t* weights;  // [out, stride]
  const int32_t* start;    // [out, 4] where the sums of red, green and blue start: rounding and padding
};

// The four taps of every output along a row: index and weight k of output x are index[k][x] and weight[k][x].
struct FourTapsRow {
  int count;
  const int32_t* index[4];
  const float* weight[4];
};

// Where each of `count` outputs of a nearest resize comes from. Where every 16 neighbours come from 16 neighbouring
// bytes, masks[x] = index[x] - index[x / 16 * 16]; else NULL.
struct Nearest {
  int count;
  const int32_t* index;
  const uint8_t* masks;
};

// What depends on the dtype T of the outputs. c is the channel.
struct Emit {
  // u8 -> (u8 / 255 - mean) / std in T, and the same normalised for DINOv2 (may be NULL).
  void (*pixels)(const uint8_t* row, int c, int count, void* clip, void* dinov2);
  // u8 -> (u8 / 255 - mean) / std rounded to fp16, in T.
  void (*through_half)(const uint8_t* row, int c, int count, void* result);
  // CLIP-normalised -> DINOv2-normalised, both T.
  void (*renormalise)(const void* clip, int c, int count, void* result);
  // Four lines of filter_row -> their vertical filter, rounded to fp16, in T.
  void (*filter_column)(const float* const* lines, const float* weights, int count, void* result);
  // row[index[x]] of `extent` values T; f32 values are rounded to fp16, as the others are already.
  void (*pick)(const void* row, int extent, const Nearest& nearest, void* result);
};

struct Rows {
  const char* name;
  // kGroup packed rows [w, 3] -> planar rows. `scratch`, aligned to 64:
  // kScratch bytes for each of (longest + 4) pixels.
  void (*horizontal)(const uint8_t* const* lines, uint8_t* const* results, int64_t plane, const Taps& taps,
                     uint8_t* scratch);
  // sum over i < count of lines[i] * weight i, for `bytes` columns (a multiple of 64). An odd count reads one line
  // more.
  void (*vertical)(const uint8_t* const* lines, const int16_t* weights, int count, int64_t bytes, uint8_t* result);
  // `extent` pixels -> taps.count values: normalised, rounded to fp16, filtered. `scratch`: extent + kSlack floats.
  void (*filter_row)(const uint8_t* row, int c, int extent, const FourTapsRow& taps, float* scratch, float* result);
  void (*pick)(const uint8_t* row, const Nearest& nearest, uint8_t* result);
  Emit emit[3];  // f32, f16, bf16
};

const Rows& rows_plain();
const Rows& rows_avx2();
const Rows& rows_avx512();

#ifdef SPHINX_X86
constexpr const Rows& (*kRows[])() = {rows_plain, rows_avx2, rows_avx512};  // in the order of Isa
#else
constexpr const Rows& (*kRows[])() = {rows_plain};
#endif

}  // namespace sphinx::views
