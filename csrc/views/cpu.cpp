// The room views on the CPU: correct, threaded over rows.
#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "views/args.h"
#include "views/math.h"

namespace sphinx::views {
namespace {

// The filter of the square, the same for both axes, and where each axis meets the picture.
struct Taps {
  Filter filter;
  std::vector<int32_t> weights;  // [out, max_taps]
  std::vector<Tap> x, y;         // [out]

  Taps(const Picture& picture, int64_t side, int out, int threads) : filter(make_filter(side, out)), x(out), y(out) {
    weights.resize(static_cast<size_t>(out) * filter.max_taps);
    const int64_t left = pad_before(side, picture.width), top = pad_before(side, picture.height);
    parallel_for(out, std::max<int64_t>(1, 4096 / filter.max_taps), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int32_t* const own = weights.data() + i * filter.max_taps;
        const Window window = window_of(filter, i);
        window_weights(filter, i, window, own);
        x[i] = split_window(window, own, left, picture.width);
        y[i] = split_window(window, own, top, picture.height);
      }
    });
  }

  // The weights of the picture's pixels.
  const int32_t* of(int64_t i, const Tap& tap) const { return weights.data() + i * filter.max_taps + tap.skip; }
};

// Row y of the picture as packed pixels: the row itself, or a copy of it in `line`.
const uint8_t* packed_row(const Picture& picture, int64_t y, std::vector<uint8_t>& line) {
  const uint8_t* row = picture.data + y * picture.stride_h;
  if (picture.stride_c == 1 && (picture.stride_w == 3 || picture.width == 1)) return row;
  line.resize(static_cast<size_t>(picture.width) * 3);
  for (int64_t x = 0; x < picture.width; ++x) {
    for (int c = 0; c < 3; ++c) line[x * 3 + c] = row[x * picture.stride_w + c * picture.stride_c];
  }
  return line.data();
}

// One row of the picture -> one row [out, 3]; NULL is a row of padding.
void resize_row(const uint8_t* line, const Taps& taps, uint8_t* result) {
  const int64_t out = static_cast<int64_t>(taps.x.size());
  for (int64_t x = 0; x < out; ++x) {
    const Tap& tap = taps.x[x];
    const int32_t padding = line ? tap.pad : tap.total;
    const int32_t* weights = taps.of(x, tap);
    int32_t red = kRoundHalf + padding * pad_colour(0);
    int32_t green = kRoundHalf + padding * pad_colour(1);
    int32_t blue = kRoundHalf + padding * pad_colour(2);
    if (line) {
      const uint8_t* pixel = line + static_cast<int64_t>(tap.first) * 3;
      for (int i = 0; i < tap.count; ++i, pixel += 3) {
        red += pixel[0] * weights[i];
        green += pixel[1] * weights[i];
        blue += pixel[2] * weights[i];
      }
    }
    result[x * 3 + 0] = clip8(red);
    result[x * 3 + 1] = clip8(green);
    result[x * 3 + 2] = clip8(blue);
  }
}

}  // namespace

void resize_cpu(const Picture& picture, uint8_t* canvas, int picture_size, int threads) {
  const int64_t side = std::max(picture.height, picture.width), row_bytes = static_cast<int64_t>(picture_size) * 3;
  const Taps taps(picture, side, picture_size, threads);

  // Horizontal pass, only over the picture's own rows. All rows of padding resize to one and the same row.
  std::vector<uint8_t> rows(static_cast<size_t>(picture.height * row_bytes)), padding(static_cast<size_t>(row_bytes));
  resize_row(nullptr, taps, padding.data());
  const int64_t work = std::min<int64_t>(taps.filter.max_taps, picture.width) * row_bytes;
  parallel_for(picture.height, std::max<int64_t>(1, (1 << 18) / work), threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> line;
    for (int64_t y = begin; y < end; ++y) {
      resize_row(packed_row(picture, y, line), taps, rows.data() + y * row_bytes);
    }
  });

  // Vertical pass.
  const int64_t taps_inside = std::min<int64_t>(taps.filter.max_taps, picture.height);
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / (taps_inside * row_bytes));
  parallel_for(picture_size, grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> sums(static_cast<size_t>(row_bytes));
    for (int64_t y = begin; y < end; ++y) {
      const Tap& tap = taps.y[y];
      const int32_t* weights = taps.of(y, tap);
      for (int64_t x = 0; x < row_bytes; ++x) sums[x] = kRoundHalf + padding[x] * tap.pad;
      for (int i = 0; i < tap.count; ++i) {
        const uint8_t* row = rows.data() + (tap.first + i) * row_bytes;
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

// Rows of the global view. The four lines it last filtered horizontally are kept: neighbouring rows share two at
// ratio 2.
class GlobalView {
 public:
  GlobalView(const uint8_t* canvas, const Outputs& out)
      : canvas_(canvas), size_(out.picture_size), side_(out.view_size), ratio_(size_ / side_) {}

  // Row y of channel c; `table` is u8 -> fp16 value of that channel.
  template <class T>
  void row(const float* table, int c, int y, T* result) {
    if (ratio_ % 2) {
      const uint8_t* pixel = canvas_ + (static_cast<int64_t>(y * ratio_ + ratio_ / 2) * size_ + ratio_ / 2) * 3 + c;
      for (int x = 0; x < side_; ++x, pixel += ratio_ * 3) result[x] = from_float<T>(table[*pixel]);
      return;
    }
    const float* lines[4];
    for (int j = 0; j < 4; ++j) lines[j] = line(table, c, clamp_index(tap_start(y, ratio_) + j, size_));
    for (int x = 0; x < side_; ++x) {
      result[x] = from_float<T>(rounded<Half>(four_taps(lines[0][x], lines[1][x], lines[2][x], lines[3][x])));
    }
  }

 private:
  // Row y of the canvas, filtered horizontally. Four neighbours fall into four slots.
  const float* line(const float* table, int c, int y) {
    const int64_t key = static_cast<int64_t>(c) * size_ + y;
    std::vector<float>& slot = lines_[y % 4];
    if (keys_[y % 4] == key) return slot.data();
    keys_[y % 4] = key;
    slot.resize(side_);
    pixels_.resize(size_ + 2);  // one more at each end, repeated
    const uint8_t* pixel = canvas_ + static_cast<int64_t>(y) * size_ * 3 + c;
    for (int x = 0; x < size_; ++x) pixels_[x + 1] = table[pixel[x * 3]];
    pixels_.front() = pixels_[1];
    pixels_.back() = pixels_[size_];
    for (int x = 0; x < side_; ++x) {
      const float* taps = pixels_.data() + 1 + tap_start(x, ratio_);
      slot[x] = four_taps_of_half(taps[0], taps[1], taps[2], taps[3]);
    }
    return slot.data();
  }

  const uint8_t* canvas_;
  int size_, side_, ratio_;
  std::vector<float> pixels_, lines_[4];
  int64_t keys_[4] = {-1, -1, -1, -1};
};

template <class T>
void cut(const uint8_t* canvas, const Outputs& out, int threads) {
  static const Tables<T> tables;
  const int size = out.picture_size, side = out.view_size, ratio = size / side;
  const int64_t planes = static_cast<int64_t>(num_views(size, side)) * 3, grain = std::max(1, (1 << 15) / side);
  T* clip = static_cast<T*>(out.clip);

  parallel_for(planes * side, grain, threads, [&](int64_t begin, int64_t end) {
    GlobalView global(canvas, out);
    for (int64_t index = begin; index < end; ++index) {
      const int y = static_cast<int>(index % side), c = static_cast<int>(index / side % 3);
      const int v = static_cast<int>(index / side / 3);
      T* row = clip + index * side;
      if (v == 0 && ratio > 1) {
        global.row(tables.global[c], c, y, row);
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
