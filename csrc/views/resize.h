// Picture -> canvas on the CPU: which rows are resized when, by whom. The arithmetic is in the loops of rows.h.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "common/parallel.h"
#include "views/plan.h"

namespace sphinx::views {

// Planar rows: [height][3 planes], memory that is not cleared.
class PlanarRows {
 public:
  PlanarRows(int64_t height, int width)
      : plane_(round_up(width, kPlaneUnit)),
        pitch_(round_up(plane_ * 3, 64)),
        memory_(new uint8_t[static_cast<size_t>(height * pitch_ + kSlack)]) {}

  int64_t plane() const { return plane_; }
  int64_t pitch() const { return pitch_; }
  uint8_t* row(int64_t y) const { return memory_.get() + y * pitch_; }
  const uint8_t* channel(int64_t y, int c) const { return row(y) + c * plane_; }

 private:
  int64_t plane_, pitch_;
  std::unique_ptr<uint8_t[]> memory_;
};

// Rows of a picture as packed pixels [w, 3] with kSlack readable bytes behind: in place where they are so, else copied.
class PackedRows {
 public:
  explicit PackedRows(const Picture& picture)
      : picture_(picture),
        bytes_(picture.width * 3),
        packed_(picture.stride_c == 1 && (picture.stride_w == 3 || picture.width == 1)),
        end_(picture.data + (picture.height - 1) * picture.stride_h + bytes_) {}

  int64_t copy_bytes() const { return bytes_ + kSlack; }  // that `copy` below must have room for

  const uint8_t* row(int64_t y, uint8_t* copy) const {
    const uint8_t* row = picture_.data + y * picture_.stride_h;
    if (packed_ && row + bytes_ + kSlack <= end_) return row;
    if (packed_) {
      std::memcpy(copy, row, static_cast<size_t>(bytes_));
    } else {
      interleave(row, copy);
    }
    return copy;
  }

 private:
  void interleave(const uint8_t* row, uint8_t* __restrict copy) const {
    const int64_t width = picture_.width, step = picture_.stride_w;
    const uint8_t *red = row, *green = row + picture_.stride_c, *blue = green + picture_.stride_c;
    if (step == 1) {  // planar pictures, as video and JPEG decoders leave them
      for (int64_t x = 0; x < width; ++x) {
        copy[x * 3 + 0] = red[x];
        copy[x * 3 + 1] = green[x];
        copy[x * 3 + 2] = blue[x];
      }
      return;
    }
    for (int64_t x = 0; x < width; ++x) {
      copy[x * 3 + 0] = red[x * step];
      copy[x * 3 + 1] = green[x * step];
      copy[x * 3 + 2] = blue[x * step];
    }
  }

  Picture picture_;
  int64_t bytes_;
  bool packed_;
  const uint8_t* end_;
};

// What `horizontal` works in.
class Scratch {
 public:
  explicit Scratch(const Taps& taps) : memory_(new uint8_t[static_cast<size_t>(taps.longest + 4) * kScratch + 64]) {}
  uint8_t* data() const { return memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64); }

 private:
  std::unique_ptr<uint8_t[]> memory_;
};

// --- the two passes -------------------------------------------------------------------------------------------------
struct Plans {
  std::shared_ptr<const AxisPlan> x, y;

  Plans(const Geometry& geometry, int size)
      : x(plan_of(geometry.x, size, Pass::horizontal)), y(plan_of(geometry.y, size, Pass::vertical)) {}
};

constexpr int64_t kWork = 1 << 20;  // multiply-adds that are worth handing to a thread

inline int64_t rows_for(int64_t work_of_a_row) {
  return std::max<int64_t>(1, kWork / std::max<int64_t>(work_of_a_row, 1));
}

// Pointers to the lines of one vertical window: `own` gives the picture's, `padding` comes last where there is any.
template <class Own>
const uint8_t* const* window_lines(const AxisPlan& plan, int y, const uint8_t* padding, const Own& own,
                                   std::vector<const uint8_t*>& lines) {
  const int count = plan.count(y), pixels = count - plan.has_padding(y);
  lines.resize(static_cast<size_t>(count) + 1);
  for (int i = 0; i < count; ++i) lines[i] = i < pixels ? own(plan.first(y) + i) : padding;
  lines[count] = count ? lines[count - 1] : padding;  // read, with weight 0, when the count is odd
  return lines.data();
}

// Horizontal pass first. `finished(y)` is called when canvas row y is there.
template <class Finished>
void resize_rows_first(const Job& job, const Plans& plans, const PlanarRows& canvas, const Rows& loops, int size,
                       Team& team, const Finished& finished) {
  const AxisPlan &x = *plans.x, &y = *plans.y;
  const int64_t low = y.low(), height = y.high() - low;
  const PackedRows source(job.picture);
  const PlanarRows rows(height + kGroup, size);  // of the picture, then of padding
  uint8_t* padding[kGroup];
  for (int i = 0; i < kGroup; ++i) padding[i] = rows.row(height + i);
  loops.horizontal(padding, padding, rows.plane(), x.padding(), nullptr);

  const Taps taps = x.taps();
  const int64_t groups = (height + kGroup - 1) / kGroup;
  team.each(groups, rows_for(static_cast<int64_t>(taps.stride) * size * kGroup), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> copies(static_cast<size_t>(source.copy_bytes()) * kGroup);
    const Scratch scratch(taps);
    for (int64_t group = begin; group < end; ++group) {
      const uint8_t* lines[kGroup];
      uint8_t* results[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        const int64_t row = std::min(group * kGroup + i, height - 1);  // the last may be done twice
        lines[i] = source.row(low + row, copies.data() + i * source.copy_bytes());
        results[i] = rows.row(row);
      }
      loops.horizontal(lines, results, rows.plane(), taps, scratch.data());
    }
  });

  team.each(size, rows_for(rows.pitch() * y.taps().stride / 2), [&](int64_t begin, int64_t end) {
    std::vector<const uint8_t*> storage;
    for (int64_t i = begin; i < end; ++i) {
      const int row = static_cast<int>(i);
      const auto own = [&](int64_t line) { return rows.row(line - low); };
      const auto lines = window_lines(y, row, padding[0], own, storage);
      loops.vertical(lines, y.weights(row), y.count(row), rows.pitch(), canvas.row(i));
      finished(row);
    }
  });
}

// Vertical pass first: a few canvas rows at a time, straight from the picture.
template <class Finished>
void resize_columns_first(const Job& job, const Plans& plans, const PlanarRows& canvas, const Rows& loops, int size,
                          Team& team, const Finished& finished) {
  const AxisPlan &x = *plans.x, &y = *plans.y;
  const PackedRows source(job.picture);
  std::vector<const uint8_t*> packed(static_cast<size_t>(job.picture.height));
  std::vector<std::unique_ptr<uint8_t[]>> copies;
  for (int64_t line = y.low(); line < y.high(); ++line) {
    if (copies.empty() || packed[std::max<int64_t>(line - 1, 0)] == copies.back().get()) {
      copies.emplace_back(new uint8_t[static_cast<size_t>(source.copy_bytes())]);
    }
    packed[line] = source.row(line, copies.back().get());
  }

  const int64_t bytes = round_up(job.picture.width * 3, 64), groups = (size + kGroup - 1) / kGroup;
  team.each(groups, rows_for(bytes * kGroup * y.taps().stride / 2), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> sums(static_cast<size_t>(bytes + kSlack) * kGroup);
    const Scratch scratch(x.taps());
    std::vector<const uint8_t*> storage;
    for (int64_t group = begin; group < end; ++group) {
      const uint8_t* lines[kGroup];
      uint8_t* results[kGroup];
      for (int i = 0; i < kGroup; ++i) {
        const int row = static_cast<int>(std::min<int64_t>(group * kGroup + i, size - 1));
        uint8_t* sum = sums.data() + i * (bytes + kSlack);
        const auto window = window_lines(y, row, nullptr, [&](int64_t line) { return packed[line]; }, storage);
        loops.vertical(window, y.weights(row), y.count(row), bytes, sum);
        lines[i] = sum;
        results[i] = canvas.row(row);
      }
      loops.horizontal(lines, results, canvas.plane(), x.taps(), scratch.data());
      for (int64_t row = group * kGroup; row < std::min<int64_t>(size, (group + 1) * kGroup); ++row) {
        finished(static_cast<int>(row));
      }
    }
  });
}

}  // namespace sphinx::views
