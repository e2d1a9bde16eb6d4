// The room views on the GPU: one launch from the pictures' bytes to every view of every encoder.
//
// A block makes one tile of one canvas, with the border that its neighbours' filters reach into, and writes all that
// follows from it. Weights are computed where they are used, in double as Pillow does, so nothing is uploaded:
//
//   strip by strip: rows of the picture -> planar bytes in shared memory -> horizontal sums, rounded to uint8
//                   -> added to the vertical sums of the tile
//   at the end:     the tile's pixels, as uint8 -> tables of what a byte becomes -> crops, ConvNeXt's and DINOv2's
//                   views, and the tile's part of the global view
//
// Where Pillow goes through the columns first, the same code runs on the transposed picture. Compiled without
// contraction of a * b + c.
#pragma once

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "views/args.h"
#include "views/math.h"
#include "views/tile.cuh"

namespace sphinx::views {

// --- what is written ------------------------------------------------------------------------------------------------
struct Range {
  int begin, end;
};

// Outputs i of a monotone map source(i) with begin <= source(i) < end; `guess` is where to start looking.
template <class Map>
__device__ Range outputs_of(int begin, int end, int count, int64_t in, const Map& source) {
  const auto first_from = [&](int at) {
    int i = static_cast<int>(static_cast<int64_t>(at) * count / in) - 2;
    i = i < 0 ? 0 : i;
    while (i < count && source(i) < at) ++i;
    return i;
  };
  return {first_from(begin), first_from(end)};
}

template <class T>
__device__ T* element(void* output, int64_t image, int c, int side, int y, int x) {
  return static_cast<T*>(output) + ((image * 3 + c) * side + y) * side + x;
}

struct Core {  // the tile without its border
  int y, x, height, width;
  int top, left;  // of what shared.tile holds
};

constexpr int kVec = 4;

template <class T>
__device__ void write_crops(const Outputs& out, int64_t first_image, const Core& core, const Shared& shared) {
  const int side = out.view_size, ratio = out.picture_size / side;
  const int64_t image = first_image + (ratio == 1 ? 0 : 1 + core.y / side * ratio + core.x / side);
  const int y0 = core.y % side, x0 = core.x % side, groups = (core.width + kVec - 1) / kVec;
  SPHINX_EACH(index, 3 * core.height * groups) {
    const int x = index % groups * kVec, y = index / groups % core.height, c = index / groups / core.height;
    const int count = core.width - x < kVec ? core.width - x : kVec;
    const uint8_t* pixels = &shared.tile[c][core.y - core.top + y][core.x - core.left + x];
    Vec<T, kVec> clip{}, dinov2{};
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i >= count) continue;
      clip.value[i] = from_float<T>(shared.exact[c][pixels[i]]);
      dinov2.value[i] = from_float<T>(shared.dinov2[c][pixels[i]]);
    }
    store(element<T>(out.clip, image, c, side, y0 + y, x0 + x), clip, count);
    if (out.dinov2 && out.dinov2_size == side) {
      store(element<T>(out.dinov2, image, c, side, y0 + y, x0 + x), dinov2, count);
    }
  }
  if (!out.convnext) return;
  const int target = out.convnext_size;
  const auto source = [&](int i) { return nearest_index(i, side, target); };
  const Range rows = outputs_of(y0, y0 + core.height, target, side, source);
  const Range columns = outputs_of(x0, x0 + core.width, target, side, source);
  const int height = rows.end - rows.begin, width = columns.end - columns.begin;
  const bool exact = target == side && ratio > 1;  // the light variants' crops
  SPHINX_EACH(index, 3 * height * width) {
    const int x = columns.begin + index % width, y = rows.begin + index / width % height, c = index / width / height;
    const uint8_t pixel = shared.tile[c][core.y - core.top + source(y) - y0][core.x - core.left + source(x) - x0];
    *element<T>(out.convnext, image, c, target, y, x) =
        from_float<T>(exact ? shared.exact[c][pixel] : shared.half[c][pixel]);
  }
}

// F.interpolate(x.half(), count, mode="bicubic") of the canvas, the part whose second tap lies in the core:
// use(c, y, x, value) for each element.
template <class Use>
__device__ void resample(int extent, int count, const Core& core, const Shared& shared, const Use& use) {
  const auto source = [&](int i) { return four_taps_of(i, extent, count).index[1]; };
  const Range rows = outputs_of(core.y, core.y + core.height, count, extent, source);
  const Range columns = outputs_of(core.x, core.x + core.width, count, extent, source);
  const int height = rows.end - rows.begin, width = columns.end - columns.begin;
  SPHINX_EACH(index, 3 * height * width) {
    const int x = columns.begin + index % width, y = rows.begin + index / width % height, c = index / width / height;
    const FourTaps down = four_taps_of(y, extent, count), right = four_taps_of(x, extent, count);
    float lines[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float pixels[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pixels[i] = shared.half[c][shared.tile[c][down.index[j] - core.top][right.index[i] - core.left]];
      }
      lines[j] = four_taps(pixels[0], pixels[1], pixels[2], pixels[3], right.weight);
    }
    use(c, y, x, rounded<Half>(four_taps(lines[0], lines[1], lines[2], lines[3], down.weight)));
  }
}

template <class T>
__device__ void write_resampled(const Outputs& out, int64_t first_image, const Core& core, const Shared& shared) {
  const int size = out.picture_size, side = out.view_size, ratio = size / side;
  const int target = out.convnext_size, dinov2 = out.dinov2_size;
  if (ratio > 1) {
    resample(size, side, core, shared, [&](int c, int y, int x, float value) {
      const T clip = from_float<T>(value);
      *element<T>(out.clip, first_image, c, side, y, x) = clip;
      if (out.dinov2 && dinov2 == side) *element<T>(out.dinov2, first_image, c, side, y, x) = dinov2_of(clip, c);
      if (!out.convnext) return;
      const auto source = [&](int i) { return nearest_index(i, side, target); };
      const Range rows = outputs_of(y, y + 1, target, side, source),
                  columns = outputs_of(x, x + 1, target, side, source);
      for (int v = rows.begin; v < rows.end; ++v) {
        for (int u = columns.begin; u < columns.end; ++u)
          *element<T>(out.convnext, first_image, c, target, v, u) = clip;
      }
    });
  }
  if (!out.dinov2 || dinov2 == side) return;
  resample(size, dinov2, core, shared, [&](int c, int y, int x, float value) {
    *element<T>(out.dinov2, first_image, c, dinov2, y, x) = dinov2_of(from_float<T>(value), c);
  });
  if (ratio == 1) return;
  resample(size, dinov2 * ratio, core, shared, [&](int c, int y, int x, float value) {
    const int64_t image = first_image + 1 + y / dinov2 * ratio + x / dinov2;
    *element<T>(out.dinov2, image, c, dinov2, y % dinov2, x % dinov2) = dinov2_of(from_float<T>(value), c);
  });
}

// --- the kernel -----------------------------------------------------------------------------------------------------
// Tiles of a canvas do not cross its crops: `tiles_along` of them to a side.
SPHINX_HD int tiles_along(int picture_size, int view_size) {
  return picture_size / view_size * ((view_size + kTile - 1) / kTile);
}

SPHINX_HD Range core_range(int tile, int view_size) {
  const int per_view = (view_size + kTile - 1) / kTile, begin = tile / per_view * view_size + tile % per_view * kTile;
  const int end = tile / per_view * view_size + view_size;
  return {begin, begin + kTile < end ? begin + kTile : end};
}

__device__ TileAxis tile_axis(int in, int before, int extent, int out, int begin, Range range) {
  return {make_filter(in, out), before, extent, begin + range.begin, range.end - range.begin};
}

// Grid: (tiles, pictures). Dynamic shared memory: Shared, then batch.table_bytes.
template <class T, int N>
__global__ void __launch_bounds__(kBlock) views_kernel(const __grid_constant__ Batch<N> batch) {
  SPHINX_DYNAMIC_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const Source& source = batch.sources[blockIdx.y];
  const Outputs& out = batch.out;
  const int size = out.picture_size, tiles = tiles_along(size, out.view_size);
  const Range y = core_range(blockIdx.x / tiles, out.view_size), x = core_range(blockIdx.x % tiles, out.view_size);
  const auto widened = [&](Range range) {
    return Range{range.begin < kBefore ? 0 : range.begin - kBefore,
                 range.end + kAfter > size ? size : range.end + kAfter};
  };
  const Range rows = widened(y), columns = widened(x);

  const TileAxis vertical = tile_axis(source.in_y, source.before_y, source.height, source.out_y, source.begin_y, rows);
  const TileAxis horizontal =
      tile_axis(source.in_x, source.before_x, source.width, source.out_x, source.begin_x, columns);
  const bool turned = source.vertical_first != 0;
  Tile tile{turned ? vertical : horizontal,
            turned ? horizontal : vertical,
            {source.data, turned ? source.stride_w : source.stride_h, turned ? source.stride_h : source.stride_w,
             source.stride_c},
            0,
            0,
            0,
            0,
            false};
  fill_tables<T>(shared);
  fill_lines(tile.along, shared.along);
  fill_lines(tile.across, shared.across);
  __syncthreads();

  int across_low = INT32_MAX, across_high = 0;
  tile.low = INT32_MAX;
  for (int i = 0; i < tile.along.count; ++i) {
    const Tap& tap = shared.along[i].tap;
    if (tap.count && tap.first < tile.low) tile.low = tap.first;
    if (tap.count && tap.first + tap.count > tile.high) tile.high = tap.first + tap.count;
    const int words = tap.count ? (tap.count + 3) / 4 + 1 : 0;
    tile.quads = words > tile.quads ? words : tile.quads;
  }
  for (int j = 0; j < tile.across.count; ++j) {
    const Tap& tap = shared.across[j].tap;
    if (tap.count && tap.first < across_low) across_low = tap.first;
    if (tap.count && tap.first + tap.count > across_high) across_high = tap.first + tap.count;
    tile.taps = tap.count > tile.taps ? tap.count : tile.taps;
  }
  if (tile.low > tile.high) tile.low = tile.high;
  const int pitch = ((tile.high - tile.low + 3) / 4) | 1;  // words, an odd number of them
  const int fitting = kStageBytes / (3 * pitch * 4);
  const int strip = fitting < kStripRows ? fitting : kStripRows;
  tile.tabled = strip > 0 && kEdge * (tile.quads * 16 + tile.taps * 4) <= batch.table_bytes;
  Quad* quads = reinterpret_cast<Quad*>(memory + sizeof(Shared));
  int32_t* weights = reinterpret_cast<int32_t*>(quads + kEdge * tile.quads);

  if (tile.tabled) fill_weights(tile, shared, quads, weights);
  start_sums(tile, shared);
  const int step = tile.tabled ? strip : kStripRows;
  for (int row = across_low; row < across_high; row += step) {
    const int count = across_high - row < step ? across_high - row : step;
    if (tile.tabled) {
      load_stage(tile, row, count, pitch, shared);
      __syncthreads();
      horizontal_staged(tile, count, pitch, quads, shared);
    } else {
      horizontal_direct(tile, row, count, shared);
    }
    __syncthreads();
    add_strip(tile, row, count, weights, shared);
    __syncthreads();
  }

  // Each sum is read by the thread that added it up.
  const int per_line = tile.along.count * 3;
  SPHINX_EACH(index, tile.across.count * per_line) {
    const int j = index / per_line, c = index % per_line / tile.along.count, i = index % tile.along.count;
    shared.tile[c][turned ? i : j][turned ? j : i] = clip8(shared.sums[j * kStripPitch + c * 36 + i]);
  }
  __syncthreads();

  const Core core{y.begin, x.begin, y.end - y.begin, x.end - x.begin, rows.begin, columns.begin};
  if (batch.canvas) {
    uint8_t* canvas = batch.canvas + static_cast<int64_t>(blockIdx.y) * size * size * 3;
    SPHINX_EACH(index, core.height * core.width * 3) {
      const int v = index / 3 / core.width, u = index / 3 % core.width, c = index % 3;
      canvas[(static_cast<int64_t>(core.y + v) * size + core.x + u) * 3 + c] =
          shared.tile[c][core.y - core.top + v][core.x - core.left + u];
    }
  }
  if (!out.clip) return;
  const int64_t image = static_cast<int64_t>(blockIdx.y) * num_views(size, out.view_size);
  write_crops<T>(out, image, core, shared);
  write_resampled<T>(out, image, core, shared);
}

inline int tiles_of(const Outputs& out) {
  const int along = tiles_along(out.picture_size, out.view_size);
  return along * along;
}

}  // namespace sphinx::views
