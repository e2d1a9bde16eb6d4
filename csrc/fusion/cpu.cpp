// The room fusion on the CPU: rows over threads, loops for the processor's instruction set.
#include <cstring>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "fusion/math.h"
#include "fusion/rows.h"

namespace sphinx::fusion {
namespace {

constexpr int64_t kGrain = 16;  // rows a thread takes at once

const RowsOf& loops_of(Isa isa, DType dtype) {
  return loops_for(isa, kRows).of[float_index(dtype)];
}

// Rows of `width` values of `size` bytes; NULL stays NULL.
template <class Byte>
Byte* row_at(Byte* rows, int64_t row, int64_t width, int64_t size) {
  return rows ? rows + row * width * size : nullptr;
}

const char* bytes(const void* memory) {
  return static_cast<const char*>(memory);
}
char* bytes(void* memory) {
  return static_cast<char*>(memory);
}

// What both directions know of a call.
template <class Args>
class Pass {
 public:
  Pass(const Args& args, const RowsOf& loops)
      : args_(args),
        layout_(args.layout),
        loops_(loops),
        size_(item_size(args.dtype)),
        sum_size_(item_size(args.sums)),
        own_(args.sums == args.dtype && args.dtype != DType::f32) {}

 protected:
  const Args& args_;
  const Layout& layout_;
  const RowsOf& loops_;
  const int64_t size_, sum_size_;
  const bool own_;  // sums come in the tensors' own half precision
};

class ForwardRows : Pass<Forward> {
 public:
  using Pass::Pass;

  // The part of the block of columns in row `row` of view `view`.
  void operator()(int64_t view, int64_t row) const {
    const Row what = row_of(layout_, row);
    const int64_t begin = args_.column * size_, length = args_.columns * size_;
    char* const out = bytes(args_.out) + (first_row(args_, view) + row) * args_.stride * size_;
    if (what.kind == RowKind::start || what.kind == RowKind::end) {
      const void* const tag = what.kind == RowKind::start ? args_.start : args_.end;
      std::memcpy(out + begin, bytes(tag) + begin, length);
      return;
    }
    const bool query = what.kind == RowKind::query;
    const Projection& of = query ? args_.query : args_.patch;
    const int64_t kept_row = view * projected_rows(layout_) + (query ? what.index : layout_.queries + what.index);
    char* const y = args_.kept ? row_at(bytes(args_.kept), kept_row, layout_.width, size_) : out;
    const auto sums = [&](const void* part, int64_t rows, int64_t index) {
      return row_at(bytes(part), view * rows + index, args_.columns, sum_size_);
    };
    const char* const fine =
        query ? sums(args_.queries, layout_.queries, what.index) : sums(args_.fine, patch_rows(layout_), what.index);
    const char* const coarse =
        query ? nullptr : sums(args_.coarse, coarse_rows(layout_), coarse_row(layout_, what.index));
    loops_.add[own_](fine, coarse, bytes(of.bias) + begin, args_.columns, y + begin);
    if (args_.column + args_.columns < layout_.width) return;
    float local[2];
    float* const stats = args_.stats ? args_.stats + 2 * kept_row : local;
    loops_.normalise(y, of.weight, of.shift, layout_.width, args_.eps, out, stats);
  }
};

// One row's way back. `unit` of a chunk is a coarse row with all that repeat it, a fine row, or a query row.
class BackwardRows : Pass<Backward> {
 public:
  using Pass::Pass;

  void patches(int64_t chunk) const {
    const int64_t width = layout_.width, units = args_.coarse ? coarse_rows(layout_) : patch_rows(layout_);
    const ColumnSums sums = cleared(args_.patch_sums, chunk);
    std::vector<float> coarse(args_.coarse ? width : 0);
    const Range range = chunk_of(layout_.views * units, chunk, args_.chunks);
    for (int64_t unit = range.begin; unit < range.end; ++unit) {
      const int64_t view = unit / units, row = unit % units;
      if (!args_.coarse) {
        one(view, row, sums, nullptr);
        continue;
      }
      std::fill(coarse.begin(), coarse.end(), 0.0f);
      for (int64_t k = 0; k < repeats_of(layout_, row); ++k) one(view, patch_row(layout_, row, k), sums, coarse.data());
      loops_.round[own_](coarse.data(), width, row_at(bytes(args_.coarse), unit, width, sum_size_));
    }
  }

  void queries(int64_t chunk) const {
    const ColumnSums sums = cleared(args_.query_sums, chunk);
    const Range range = chunk_of(layout_.views * layout_.queries, chunk, args_.chunks);
    for (int64_t unit = range.begin; unit < range.end; ++unit) {
      const int64_t view = unit / layout_.queries, row = unit % layout_.queries;
      row_back(view, row, args_.query_weight, row_at(bytes(args_.queries), unit, layout_.width, sum_size_), nullptr,
               sums);
    }
  }

 private:
  ColumnSums cleared(float* all, int64_t chunk) const {
    float* const own = all + chunk * 3 * layout_.width;
    std::fill(own, own + 3 * layout_.width, 0.0f);
    return {own, own + layout_.width, own + 2 * layout_.width};
  }

  void one(int64_t view, int64_t row, const ColumnSums& sums, float* coarse) const {
    char* const result = row_at(bytes(args_.fine), view * patch_rows(layout_) + row, layout_.width, sum_size_);
    row_back(view, layout_.queries + row, args_.patch_weight, result, coarse, sums);
  }

  void row_back(int64_t view, int64_t projected, const void* weight, char* result, float* coarse,
                const ColumnSums& sums) const {
    const int64_t token = view * token_rows(layout_) + projected + (layout_.tags ? 1 : 0);
    const int64_t kept = view * projected_rows(layout_) + projected;
    loops_.backward[own_](row_at(bytes(args_.grad), token, layout_.width, size_),
                          row_at(bytes(args_.kept), kept, layout_.width, size_), args_.stats + 2 * kept, weight,
                          layout_.width, result, coarse, sums);
  }
};

}  // namespace

void run_cpu(const Forward& args, Isa isa, int threads) {
  const ForwardRows rows(args, loops_of(isa, args.dtype));
  const int64_t per_view = token_rows(args.layout);
  parallel_for(args.layout.views * per_view, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) rows(i / per_view, i % per_view);
  });
}

void run_cpu(const Backward& args, Isa isa, int threads) {
  const BackwardRows rows(args, loops_of(isa, args.dtype));
  parallel_for(2 * args.chunks, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i < args.chunks) {
        rows.patches(i);
      } else if (args.layout.queries) {
        rows.queries(i - args.chunks);
      }
    }
  });
}

void run_cpu(const Norm& args, Isa isa, int threads) {
  const RowsOf& loops = loops_of(isa, args.dtype);
  const int64_t size = item_size(args.dtype);
  parallel_for(args.groups * args.rows, kGrain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float stats[2];
      loops.normalise(bytes(args.in) + row_offset(args, row, args.in_group, args.in_stride) * size, args.weight,
                      args.shift, args.width, args.eps,
                      bytes(args.out) + row_offset(args, row, args.out_group, args.out_stride) * size, stats);
    }
  });
}

}  // namespace sphinx::fusion
