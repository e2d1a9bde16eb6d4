// Which row is what: index arithmetic of the room fusion, shared by host and device.
#pragma once

#include "common/host_device.h"
#include "fusion/args.h"

namespace sphinx::fusion {

// Rows of a view: patch rows are the class row and the patches; projected rows all but the tags.
SPHINX_HD int64_t patch_rows(const Layout& layout) {
  return 1 + layout.grid * layout.grid;
}
SPHINX_HD int64_t projected_rows(const Layout& layout) {
  return layout.queries + patch_rows(layout);
}
SPHINX_HD int64_t token_rows(const Layout& layout) {
  return projected_rows(layout) + (layout.tags ? 2 : 0);
}
SPHINX_HD int64_t coarse_rows(const Layout& layout) {
  const int64_t side = layout.grid / layout.repeat;
  return 1 + side * side;
}

// The row of the coarse map that patch row `row` repeats; the class row is its own.
SPHINX_HD int64_t coarse_row(const Layout& layout, int64_t row) {
  if (row == 0) return 0;
  const int64_t y = (row - 1) / layout.grid, x = (row - 1) % layout.grid;
  return 1 + y / layout.repeat * (layout.grid / layout.repeat) + x / layout.repeat;
}

// The other way: coarse row `row` is repeated in this many patch rows, of which this is number `k`.
SPHINX_HD int64_t repeats_of(const Layout& layout, int64_t row) {
  return row == 0 ? 1 : layout.repeat * layout.repeat;
}
SPHINX_HD int64_t patch_row(const Layout& layout, int64_t row, int64_t k) {
  if (row == 0) return 0;
  const int64_t side = layout.grid / layout.repeat;
  const int64_t y = (row - 1) / side * layout.repeat + k / layout.repeat;
  const int64_t x = (row - 1) % side * layout.repeat + k % layout.repeat;
  return 1 + y * layout.grid + x;
}

enum class RowKind : uint8_t { start, query, patch, end };

struct Row {
  RowKind kind;
  int64_t index;  // among the rows of its kind
};

// What row `row` of a view's tokens is.
SPHINX_HD Row row_of(const Layout& layout, int64_t row) {
  if (layout.tags) {
    if (row == 0) return {RowKind::start, 0};
    if (--row == projected_rows(layout)) return {RowKind::end, 0};
  }
  if (row < layout.queries) return {RowKind::query, row};
  return {RowKind::patch, row - layout.queries};
}

// The row of `out` where view `view` starts, or -1 when the view does not fit there.
SPHINX_HD int64_t first_row(const Forward& args, int64_t view) {
  const int64_t rows = token_rows(args.layout), first = args.first ? args.first[view] : view * rows;
  return first >= 0 && first <= args.rows - rows ? first : -1;
}

// Where row `row` of all groups starts.
SPHINX_HD int64_t row_offset(const Norm& args, int64_t row, int64_t group, int64_t stride) {
  return row / args.rows * group + row % args.rows * stride;
}

// Chunk `chunk` of `count` units: [begin, end).
struct Range {
  int64_t begin, end;
};
SPHINX_HD Range chunk_of(int64_t count, int64_t chunk, int64_t chunks) {
  const int64_t size = (count + chunks - 1) / chunks, begin = chunk * size;
  return {begin < count ? begin : count, begin + size < count ? begin + size : count};
}

}  // namespace sphinx::fusion
