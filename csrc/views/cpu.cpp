// The room views on the CPU: correct, threaded over rows.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "views/args.h"
#include "views/math.h"

namespace sphinx::views {
namespace {

// The filter of one axis: windows [out], weights [out, max_taps]. A padded square needs one for both axes.
struct Taps {
  Filter filter;
  std::vector<Window> windows;
  std::vector<int32_t> weights;

  Taps(int64_t in, int out, int threads) : filter(make_filter(in, out)), windows(out) {
    weights.resize(static_cast<size_t>(out) * filter.max_taps);
    parallel_for(out, std::max<int64_t>(1, 4096 / filter.max_taps), threads, [&](int64_t begin, int64_t end) {
      for (int64_t x = begin; x < end; ++x) {
        windows[x] = window_of(filter, x);
        window_weights(filter, x, windows[x], weights.data() + x * filter.max_taps);
      }
    });
  }

  const int32_t* of(int64_t x) const { return weights.data() + x * filter.max_taps; }
};

void fill_colour(uint8_t* line, int64_t pixels) {
  for (int64_t x = 0; x < pixels; ++x) {
    for (int c = 0; c < 3; ++c) line[x * 3 + c] = pad_colour(c);
  }
}

void copy_row(const Picture& picture, int64_t y, uint8_t* line) {
  const uint8_t* row = picture.data + y * picture.stride_h;
  if (picture.stride_c == 1 && picture.stride_w == 3) {
    std::memcpy(line, row, static_cast<size_t>(picture.width) * 3);
    return;
  }
  for (int64_t x = 0; x < picture.width; ++x) {
    for (int c = 0; c < 3; ++c) line[x * 3 + c] = row[x * picture.stride_w + c * picture.stride_c];
  }
}

// One row of the square [side, 3] -> one row [out, 3].
void resize_row(const uint8_t* line, const Taps& taps, int out, uint8_t* result) {
  for (int x = 0; x < out; ++x) {
    const Window window = taps.windows[x];
    const int32_t* weights = taps.of(x);
    const uint8_t* pixel = line + static_cast<int64_t>(window.first) * 3;
    int32_t red = kRoundHalf, green = kRoundHalf, blue = kRoundHalf;
    for (int i = 0; i < window.count; ++i, pixel += 3) {
      red += pixel[0] * weights[i];
      green += pixel[1] * weights[i];
      blue += pixel[2] * weights[i];
    }
    result[x * 3 + 0] = clip8(red);
    result[x * 3 + 1] = clip8(green);
    result[x * 3 + 2] = clip8(blue);
  }
}

}  // namespace

void resize_cpu(const Picture& picture, uint8_t* canvas, int picture_size, int threads) {
  const int64_t side = std::max(picture.height, picture.width), row_bytes = static_cast<int64_t>(picture_size) * 3;
  const int64_t top = pad_before(side, picture.height), left = pad_before(side, picture.width);
  const Taps taps(side, picture_size, threads);

  // Horizontal pass, only over the picture's own rows. All rows of padding resize to one and the same row, the last
  // here.
  std::vector<uint8_t> rows(static_cast<size_t>((picture.height + 1) * row_bytes));
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / (row_bytes * taps.filter.max_taps));
  parallel_for(picture.height + 1, grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> line(static_cast<size_t>(side) * 3);
    fill_colour(line.data(), side);
    for (int64_t y = begin; y < end; ++y) {
      if (y < picture.height) {
        copy_row(picture, y, line.data() + left * 3);
      } else {
        fill_colour(line.data(), side);
      }
      resize_row(line.data(), taps, picture_size, rows.data() + y * row_bytes);
    }
  });

  // Vertical pass.
  parallel_for(picture_size, grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> sums(static_cast<size_t>(row_bytes));
    for (int64_t y = begin; y < end; ++y) {
      std::fill(sums.begin(), sums.end(), kRoundHalf);
      const Window window = taps.windows[y];
      const int32_t* weights = taps.of(y);
      for (int i = 0; i < window.count; ++i) {
        const int64_t source = window.first + i - top;
        const bool inside = source >= 0 && source < picture.height;
        const uint8_t* row = rows.data() + (inside ? source : picture.height) * row_bytes;
        const int32_t weight = weights[i];
        for (int64_t x = 0; x < row_bytes; ++x) sums[x] += row[x] * weight;
      }
      for (int64_t x = 0; x < row_bytes; ++x) canvas[y * row_bytes + x] = clip8(sums[x]);
    }
  });
}

namespace {

// u8 -> what each view stores, built with the float operations it replaces.
template <class T>
struct Tables {
  T crop[3][256];        // normalised, rounded to T
  float global[3][256];  // normalised, rounded to fp16

  Tables() {
    for (int c = 0; c < 3; ++c) {
      for (int value = 0; value < 256; ++value) {
        crop[c][value] = from_float<T>(normalise(value, c));
        global[c][value] = rounded<Half>(normalise(value, c));
      }
    }
  }
};

// Row y of channel c of the global view.
template <class T>
void global_row(const uint8_t* canvas, const Outputs& out, const float* table, int c, int y, T* row) {
  const int size = out.picture_size, ratio = size / out.view_size;
  if (ratio % 2) {
    const uint8_t* pixel = canvas + static_cast<int64_t>(y * ratio + ratio / 2) * size * 3 + ratio / 2 * 3 + c;
    for (int x = 0; x < out.view_size; ++x, pixel += ratio * 3) row[x] = from_float<T>(table[*pixel]);
    return;
  }
  const uint8_t* rows[4];
  for (int j = 0; j < 4; ++j) {
    rows[j] = canvas + static_cast<int64_t>(clamp_index(tap_start(y, ratio) + j, size)) * size * 3 + c;
  }
  for (int x = 0; x < out.view_size; ++x) {
    const int start = tap_start(x, ratio);
    int column[4];
    for (int i = 0; i < 4; ++i) column[i] = clamp_index(start + i, size) * 3;
    float taps[4];
    for (int j = 0; j < 4; ++j) {
      taps[j] = four_taps(table[rows[j][column[0]]], table[rows[j][column[1]]], table[rows[j][column[2]]],
                          table[rows[j][column[3]]]);
    }
    row[x] = from_float<T>(rounded<Half>(four_taps(taps[0], taps[1], taps[2], taps[3])));
  }
}

template <class T>
void cut(const uint8_t* canvas, const Outputs& out, int threads) {
  static const Tables<T> tables;
  const int size = out.picture_size, side = out.view_size, ratio = size / side;
  const int64_t planes = static_cast<int64_t>(num_views(size, side)) * 3, grain = std::max(1, (1 << 15) / side);
  T* clip = static_cast<T*>(out.clip);

  parallel_for(planes * side, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int y = static_cast<int>(index % side), c = static_cast<int>(index / side % 3);
      const int v = static_cast<int>(index / side / 3);
      T* row = clip + index * side;
      if (v == 0 && ratio > 1) {
        global_row(canvas, out, tables.global[c], c, y, row);
      } else {
        const Corner corner = crop_corner(v, ratio, side);
        const uint8_t* pixel = canvas + (static_cast<int64_t>(corner.y + y) * size + corner.x) * 3 + c;
        for (int x = 0; x < side; ++x, pixel += 3) row[x] = tables.crop[c][*pixel];
      }
      if (out.dinov2) {
        T* dinov2 = static_cast<T*>(out.dinov2) + index * side;
        for (int x = 0; x < side; ++x) dinov2[x] = dinov2_of(row[x], c);
      }
    }
  });

  if (!out.convnext) return;
  const int target = out.convnext_size;
  parallel_for(planes * target, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const T* source =
          clip + (index / target * side + nearest_index(static_cast<int>(index % target), side, target)) * side;
      T* row = static_cast<T*>(out.convnext) + index * target;
      for (int x = 0; x < target; ++x) {
        row[x] = from_float<T>(rounded<Half>(to_float(source[nearest_index(x, side, target)])));
      }
    }
  });
}

}  // namespace

void cut_cpu(const uint8_t* canvas, const Outputs& out, int threads) {
  dispatch_float(out.dtype, [&](auto type) { cut<decltype(type)>(canvas, out, threads); });
}

}  // namespace sphinx::views
