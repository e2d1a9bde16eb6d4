// One tile of one canvas on the GPU: arguments of the launch, shared memory, and the two passes, strip by strip.
#pragma once

#include "common/launch.cuh"
#include "views/args.h"
#include "views/math.h"

namespace sphinx::views {

constexpr int kTile = 32;               // side of a tile
constexpr int kBefore = 1, kAfter = 2;  // border: what four taps reach around the second
constexpr int kEdge = kTile + kBefore + kAfter;
constexpr int kStripRows = 32;       // a lane a row
constexpr int kStripPitch = 3 * 36;  // bytes of a strip's row: an odd number of words, so no two lanes collide
constexpr int kStageBytes = 24 << 10;
constexpr int kSmall = 32, kLarge = 320;  // pictures a launch can take, in its arguments: 4 KB, or the 32 KB of CUDA 12

// --- arguments ------------------------------------------------------------------------------------------------------
struct Source {  // Picture and Geometry, packed
  const uint8_t* data;
  int64_t stride_h, stride_w, stride_c;
  int32_t height, width;
  int32_t in_y, before_y, out_y, begin_y;
  int32_t in_x, before_x, out_x, begin_x;
  int32_t vertical_first;
};

template <int N>
struct Batch {
  Outputs out;      // of the first picture
  uint8_t* canvas;  // the same, or NULL
  int32_t table_bytes;
  Source sources[N];
};

// --- one axis of a tile ---------------------------------------------------------------------------------------------
struct Line {  // an output: where its window meets the picture, and what makes its weights
  Tap tap;
  Window window;
  double sum;
};

struct TileAxis {
  Filter filter;
  int32_t before, extent;  // of the picture in the plane
  int32_t first, count;    // outputs, counted in the resized plane
};

SPHINX_HD int64_t taps_of(int64_t in, int64_t out, int64_t extent) {
  const int64_t most = make_filter(in, out).max_taps;
  return most < extent ? most : extent;
}

// Shared memory for the weights of a tile: 16 bytes a quad along, four bytes a tap across.
SPHINX_HD int64_t quads_of(int64_t taps) {
  return (taps + 3) / 4 + 1;  // one more, since a window starts anywhere in a word
}
SPHINX_HD int64_t table_bytes_of(int64_t taps_along, int64_t taps_across) {
  return kEdge * (quads_of(taps_along) * 16 + taps_across * 4);
}

SPHINX_HD int32_t weight_at(const TileAxis& axis, const Line& line, int output, int i) {
  return fixed_weight(window_weight(axis.filter, axis.first + output, line.window, i), line.sum);
}

// Four bytes by four digits, added to `sum`.
SPHINX_HD int32_t dot_unsigned(uint32_t pixels, uint32_t digits, int32_t sum) {
#ifdef __CUDA_ARCH__
  return static_cast<int32_t>(__dp4a(pixels, digits, static_cast<uint32_t>(sum)));
#else
  for (int i = 0; i < 4; ++i) sum += static_cast<int32_t>((pixels >> 8 * i & 255) * (digits >> 8 * i & 255));
  return sum;
#endif
}
SPHINX_HD int32_t dot_signed(uint32_t pixels, uint32_t digits, int32_t sum) {
#ifdef __CUDA_ARCH__
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(pixels), "r"(digits));
  return sum;
#else
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int32_t>(pixels >> 8 * i & 255) * static_cast<int8_t>(digits >> 8 * i & 255);
  }
  return sum;
#endif
}

// Wraps as Pillow's int32 does.
SPHINX_HD int32_t joined(int32_t low, int32_t middle, int32_t high) {
  const auto bits = [](int32_t value) { return static_cast<uint32_t>(value); };
  return static_cast<int32_t>(bits(low) + (bits(middle) << 8) + (bits(high) << 16));
}

struct alignas(16) Quad {  // of weights: w = 65536 * high + 256 * middle + low, four of each
  uint32_t low, middle, high, unused;
};

// --- shared memory --------------------------------------------------------------------------------------------------
struct Shared {
  float exact[3][256], half[3][256], dinov2[3][256];  // what a byte becomes
  Line along[kEdge], across[kEdge];
  int32_t sums[kEdge * kStripPitch];        // vertical sums [across][c][along]
  uint8_t strip[kStripRows * kStripPitch];  // horizontal results [row][c][along]
  uint8_t tile[3][kEdge][kEdge + 1];        // canvas [c][y][x]
  alignas(16) uint8_t stage[kStageBytes];
  // Behind it: Quad quads[kEdge][quads]; int32_t weights[kEdge][taps].
};

#define SPHINX_EACH(index, count) for (int index = threadIdx.x; index < (count); index += blockDim.x)

// What every byte becomes, computed with the float operations it replaces.
template <class T>
__device__ void fill_tables(Shared& shared) {
  SPHINX_EACH(i, 3 * 256) {
    const int c = i / 256;
    const float value = normalise(i % 256, c);
    shared.exact[c][i % 256] = value;
    shared.half[c][i % 256] = rounded<Half>(value);
    shared.dinov2[c][i % 256] = to_float(dinov2_of(from_float<T>(value), c));
  }
}

__device__ void fill_lines(const TileAxis& axis, Line* lines) {
  SPHINX_EACH(i, axis.count) {
    Line& line = lines[i];
    line.window = window_of(axis.filter, axis.first + i);
    line.sum = window_sum(axis.filter, axis.first + i, line.window);
    line.tap = split_window(line.window, axis.before, axis.extent, [&](int k) { return weight_at(axis, line, i, k); });
  }
}

// --- the strips -----------------------------------------------------------------------------------------------------
// The picture as the passes see it: rows across, pixels along.
struct Pixels {
  const uint8_t* data;
  int64_t stride_across, stride_along, stride_c;
};

struct Tile {
  TileAxis along, across;
  Pixels pixels;
  int32_t low, high;  // pixels along that any window reads
  int32_t quads, taps;
  bool tabled;  // the weights are in shared memory
};

// Digits of the weights along, aligned to the words of the staged rows, and the weights across.
__device__ void fill_weights(const Tile& tile, Shared& shared, Quad* quads, int32_t* weights) {
  SPHINX_EACH(index, tile.along.count * tile.quads) {
    const int i = index / tile.quads, q = index % tile.quads;
    const Line& line = shared.along[i];
    const int word = (line.tap.first - tile.low) / 4 + q;
    Quad quad{0, 0, 0, 0};
    for (int k = 0; k < 4; ++k) {
      const int tap = tile.low + word * 4 + k - line.tap.first;
      if (tap < 0 || tap >= line.tap.count) continue;
      const uint32_t weight = static_cast<uint32_t>(weight_at(tile.along, line, i, line.tap.skip + tap));
      quad.low |= (weight & 255) << 8 * k;
      quad.middle |= (weight >> 8 & 255) << 8 * k;
      quad.high |= (weight >> 16 & 255) << 8 * k;
    }
    quads[index] = quad;
  }
  SPHINX_EACH(index, tile.across.count * tile.taps) {
    const Line& line = shared.across[index / tile.taps];
    const int tap = index % tile.taps;
    weights[index] = tap < line.tap.count ? weight_at(tile.across, line, index / tile.taps, line.tap.skip + tap) : 0;
  }
}

// Rows [row, row + count) -> planes in shared memory, words of four pixels of one colour.
__device__ void load_stage(const Tile& tile, int row, int count, int pitch, Shared& shared) {
  const int width = tile.high - tile.low;
  SPHINX_EACH(index, count * pitch * 4) {
    const int y = index / (pitch * 4), x = index % (pitch * 4);
    const uint8_t* pixel = tile.pixels.data + (row + y) * tile.pixels.stride_across +
                           static_cast<int64_t>(tile.low + x) * tile.pixels.stride_along;
    for (int c = 0; c < 3; ++c) {
      shared.stage[(c * count + y) * pitch * 4 + x] = x < width ? pixel[c * tile.pixels.stride_c] : 0;
    }
  }
}

__device__ void horizontal_staged(const Tile& tile, int count, int pitch, const Quad* quads, Shared& shared) {
  const uint32_t* stage = reinterpret_cast<const uint32_t*>(shared.stage);
  SPHINX_EACH(index, tile.along.count * 3 * kStripRows) {  // a warp: one output, 32 rows
    const int y = index % kStripRows, c = index / kStripRows % 3, i = index / kStripRows / 3;
    if (y >= count) continue;
    const Tap& tap = shared.along[i].tap;
    const int start = (tap.first - tile.low) / 4;
    const int words = tap.count ? (tap.first - tile.low + tap.count + 3) / 4 - start : 0;
    const uint32_t* row = stage + (c * count + y) * pitch + start;
    int32_t low = kRoundHalf + tap.pad * pad_colour(c), middle = 0, high = 0;
    for (int q = 0; q < words; ++q) {
      const Quad quad = quads[i * tile.quads + q];
      const uint32_t four = row[q];
      low = dot_unsigned(four, quad.low, low);
      middle = dot_unsigned(four, quad.middle, middle);
      high = dot_signed(four, quad.high, high);
    }
    shared.strip[y * kStripPitch + c * 36 + i] = clip8(joined(low, middle, high));
  }
}

// Without tables or staging: pictures so large that one window does not fit in shared memory.
__device__ void horizontal_direct(const Tile& tile, int row, int count, Shared& shared) {
  SPHINX_EACH(index, tile.along.count * 3 * count) {
    const int i = index % tile.along.count, c = index / tile.along.count % 3, y = index / tile.along.count / 3;
    const Line& line = shared.along[i];
    const uint8_t* pixel = tile.pixels.data + (row + y) * tile.pixels.stride_across +
                           line.tap.first * tile.pixels.stride_along + c * tile.pixels.stride_c;
    uint32_t sum = static_cast<uint32_t>(kRoundHalf + line.tap.pad * pad_colour(c));
    for (int k = 0; k < line.tap.count; ++k, pixel += tile.pixels.stride_along) {
      sum += static_cast<uint32_t>(*pixel * weight_at(tile.along, line, i, line.tap.skip + k));
    }
    shared.strip[y * kStripPitch + c * 36 + i] = clip8(static_cast<int32_t>(sum));
  }
}

__device__ void add_strip(const Tile& tile, int row, int count, const int32_t* weights, Shared& shared) {
  const int columns = tile.along.count * 3;
  SPHINX_EACH(index, tile.across.count * columns) {
    const int j = index / columns, c = index % columns / tile.along.count, i = index % tile.along.count;
    const Line& line = shared.across[j];
    const int begin = line.tap.first > row ? line.tap.first : row;
    const int last = line.tap.first + line.tap.count, end = last < row + count ? last : row + count;
    uint32_t sum = static_cast<uint32_t>(shared.sums[j * kStripPitch + c * 36 + i]);
    for (int y = begin; y < end; ++y) {
      const int tap = y - line.tap.first;
      const int32_t weight =
          tile.tabled ? weights[j * tile.taps + tap] : weight_at(tile.across, line, j, line.tap.skip + tap);
      sum += static_cast<uint32_t>(shared.strip[(y - row) * kStripPitch + c * 36 + i] * weight);
    }
    shared.sums[j * kStripPitch + c * 36 + i] = static_cast<int32_t>(sum);
  }
}

// The sums start with the rounding and with what lies outside the picture, all of which is one colour.
__device__ void start_sums(const Tile& tile, Shared& shared) {
  const int columns = tile.along.count * 3;
  SPHINX_EACH(index, tile.across.count * columns) {
    const int j = index / columns, c = index % columns / tile.along.count, i = index % tile.along.count;
    const uint8_t padding = clip8(kRoundHalf + shared.along[i].tap.total * pad_colour(c));
    shared.sums[j * kStripPitch + c * 36 + i] = kRoundHalf + padding * shared.across[j].tap.pad;
  }
}

// --- the host's part ------------------------------------------------------------------------------------------------
constexpr int64_t kMostTableBytes = 96 << 10;  // windows of about 330 pixels; larger ones go without tables

// The arguments of one launch.
template <int N>
Batch<N> make_batch(const Job* jobs, int count) {
  Batch<N> batch;
  batch.out = jobs[0].out;
  batch.canvas = jobs[0].canvas;
  batch.table_bytes = 0;
  const auto small = [](int64_t value) { return static_cast<int32_t>(value); };  // all were checked against kMaxSide
  for (int i = 0; i < count; ++i) {
    const Picture& picture = jobs[i].picture;
    const Axis &y = jobs[i].geometry.y, &x = jobs[i].geometry.x;
    const bool turned = jobs[i].geometry.vertical_first;
    batch.sources[i] = {picture.data,
                        picture.stride_h,
                        picture.stride_w,
                        picture.stride_c,
                        small(y.extent),
                        small(x.extent),
                        small(y.in),
                        small(y.before),
                        y.out,
                        y.begin,
                        small(x.in),
                        small(x.before),
                        x.out,
                        x.begin,
                        turned};
    const int64_t down = taps_of(y.in, y.out, y.extent), right = taps_of(x.in, x.out, x.extent);
    const int64_t bytes = turned ? table_bytes_of(down, right) : table_bytes_of(right, down);
    const int64_t most = bytes < kMostTableBytes ? bytes : kMostTableBytes;
    batch.table_bytes = batch.table_bytes < most ? small(most) : batch.table_bytes;
  }
  return batch;
}

}  // namespace sphinx::views
