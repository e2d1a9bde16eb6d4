// The room fusion as Python sees it: sphinx_fast._C.fusion, fusion_backward and layer_norm.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/borrow.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "fusion/args.h"
#include "fusion/gemm.h"
#include "fusion/math.h"

namespace py = pybind11;

namespace sphinx::fusion {
namespace {

constexpr int64_t kMaxExtent = 1 << 20;  // of a width, a grid, a number of queries: products of three fit int64

int64_t checked_extent(int64_t value, int64_t least, const char* name) {
  check(value >= least && value <= kMaxExtent, name, ": expected ", least, " to ", kMaxExtent, ", got ", value);
  return value;
}

// The dtype of the sums: float32 or that of the tokens, the same for all that are there.
DType checked_sums(std::initializer_list<const Optional*> all, DType dtype) {
  const TensorView* first = nullptr;
  for (const Optional* one : all) {
    if (!*one) continue;
    (*one)->expect_dtype({first ? first->dtype : DType::f32, first ? first->dtype : dtype});
    if (!first) first = &**one;
  }
  return first ? first->dtype : DType::f32;
}

Layout checked_layout(int64_t views, int64_t queries, int64_t grid, int64_t repeat, bool tags, int64_t width) {
  const Layout layout{checked_extent(views, 0, "views"),
                      checked_extent(queries, 0, "queries"),
                      checked_extent(grid, 1, "grid"),
                      checked_extent(repeat, 1, "repeat"),
                      tags,
                      checked_extent(width, 1, "width")};
  check(layout.grid <= 4096, "grid: expected 1 to 4096, got ", grid);
  check(layout.grid % layout.repeat == 0, "repeat: expected a divisor of the grid ", grid, ", got ", repeat);
  checked_mul(checked_mul(layout.views, token_rows(layout), "views"), layout.width, "views");
  return layout;
}

// Where each view starts: inside `out`, in order, none over another. On a GPU the kernel looks.
void check_first(const Optional& first, const TensorView& out, const Layout& layout) {
  if (!first) {
    check(out.shape[0] == layout.views * token_rows(layout), out.name, ": expected ", layout.views * token_rows(layout),
          " rows, got shape ", out.shape_text());
    return;
  }
  first.expect(out, DType::i64, {layout.views});
  if (out.device != DeviceKind::cpu) return;
  int64_t least = 0;
  for (int64_t view = 0; view < layout.views; ++view) {
    const int64_t row = first->as<int64_t>()[view];
    check(row >= least && row <= out.shape[0] - token_rows(layout), first->name, ": expected view ", view,
          " to start in rows ", least, " to ", out.shape[0] - token_rows(layout), ", got ", row);
    least = row + token_rows(layout);
  }
}

// A projection's bias, norm weight and norm bias.
struct Vectors {
  explicit Vectors(const py::object& of, const char* name)
      : given(!of.is_none()),
        items{item(of, 0, name), item(of, 1, name), item(of, 2, name)},
        all{Optional(items[0], name), Optional(items[1], name), Optional(items[2], name)} {}

  static py::object item(const py::object& of, int index, const char* name) {
    if (of.is_none()) return of;
    check_type(py::isinstance<py::list>(of) || py::isinstance<py::tuple>(of), name,
               ": expected a list or tuple of three tensors, got ", Py_TYPE(of.ptr())->tp_name);
    check(py::len(of) == 3, name, ": expected three tensors, got ", py::len(of));
    return py::reinterpret_borrow<py::sequence>(of)[index];
  }
  Projection checked(const TensorView& on, int64_t width) const {
    for (const Optional& one : all) one.expect(on, on.dtype, {width});
    check(!given || (all[0] && all[1] && all[2]), "patch, query: expected three tensors, got None");
    return {all[0].data(), all[1].data(), all[2].data()};
  }

  bool given;
  py::object items[3];  // alive as long as they are borrowed, whatever becomes of the list
  Optional all[3];
};

void run_fusion(const py::object& fine_object, const py::object& coarse_object, const py::object& queries_object,
                const py::object& out_object, int64_t views, int64_t query_count, int64_t grid, int64_t repeat,
                int64_t column, const py::object& patch_object, const py::object& query_object,
                const py::object& start_object, const py::object& end_object, double eps,
                const py::object& first_object, const py::object& kept_object, const py::object& stats_object,
                const std::optional<std::string>& isa_name, int64_t thread_count) {
  const Isa isa = checked_isa(isa_name);
  const int threads = checked_threads(thread_count);
  const Borrow out_borrow(out_object.ptr(), "out");
  const TensorView& out = *out_borrow;
  check_backend(out);
  out.expect_dtype({DType::f32, DType::f16, DType::bf16}).expect_shape({kAny, kAny});
  const int64_t width = out.shape[1];
  check(out.numel() == 0 || ((width == 1 || out.strides[1] == 1) && (out.shape[0] == 1 || out.strides[0] >= width)),
        "out: expected rows without gaps inside that do not overlap, got strides [", out.strides[0], ", ",
        out.strides[1], "]");

  const Optional fine(fine_object, "fine"), coarse(coarse_object, "coarse"), queries(queries_object, "queries");
  const Optional start(start_object, "start"), end(end_object, "end"), first(first_object, "first");
  const Optional kept(kept_object, "kept"), stats(stats_object, "stats");
  check(bool(start) == bool(end), "start, end: expected both or none");
  const Layout layout = checked_layout(views, query_count, grid, repeat, bool(start), width);
  const int64_t count = layout.views, projected = projected_rows(layout);

  check(fine || coarse, "fine: expected a tensor, got None, and coarse is None too");
  check(coarse || layout.repeat == 1, "repeat: expected 1 without coarse, got ", layout.repeat);
  check(bool(queries) == (layout.queries > 0), "queries: expected a tensor where there are query rows, and only there");
  const DType sums = checked_sums({&fine, &coarse, &queries}, out.dtype);
  const TensorView& one = fine ? *fine : *coarse;
  one.expect_shape({kAny, kAny});
  const int64_t columns = one.shape[1];
  check(column >= 0 && columns >= 1 && columns <= width && column <= width - columns, "column: expected ", columns,
        " columns within ", width, ", got column ", column);
  fine.expect(out, sums, {count * patch_rows(layout), columns});
  coarse.expect(out, sums, {count * coarse_rows(layout), columns});
  queries.expect(out, sums, {count * layout.queries, columns});

  const Vectors patch(patch_object, "patch"), query(query_object, "query");
  check(patch.given, "patch: expected bias, weight and shift, got None");
  check(query.given || layout.queries == 0, "query: expected bias, weight and shift, got None");
  start.expect(out, out.dtype, {width});
  end.expect(out, out.dtype, {width});
  kept.expect(out, out.dtype, {count, projected, width});
  stats.expect(out, DType::f32, {count, projected, 2});
  check_first(first, out, layout);

  const Forward args{layout,
                     fine.data(),
                     coarse.data(),
                     queries.data(),
                     column,
                     columns,
                     patch.checked(out, width),
                     query.checked(out, width),
                     start.data(),
                     end.data(),
                     static_cast<float>(eps),
                     static_cast<const int64_t*>(first.data()),
                     out.shape[0],
                     out.strides[0],
                     out.data,
                     kept.data(),
                     static_cast<float*>(stats.data()),
                     out.dtype,
                     sums};
  if (count == 0) return;
  const py::gil_scoped_release released;
  if (out.device == DeviceKind::cpu) return run_cpu(args, isa, threads);
#ifdef SPHINX_WITH_CUDA
  check(column == 0 && columns == width, "column: expected all columns at once on a GPU");
  run_cuda(args, out.device_id, out.stream);
#endif
}

void run_backward(const py::object& grad_object, const py::object& kept_object, const py::object& stats_object,
                  int64_t query_count, int64_t grid, int64_t repeat, bool tags, const py::object& patch_weight_object,
                  const py::object& query_weight_object, const py::object& fine_object, const py::object& coarse_object,
                  const py::object& queries_object, const py::object& patch_sums_object,
                  const py::object& query_sums_object, const std::optional<std::string>& isa_name,
                  int64_t thread_count) {
  const Isa isa = checked_isa(isa_name);
  const int threads = checked_threads(thread_count);
  const Borrow grad_borrow(grad_object.ptr(), "grad");
  const TensorView& grad = *grad_borrow;
  check_backend(grad);
  grad.expect_dtype({DType::f32, DType::f16, DType::bf16}).expect_shape({kAny, kAny, kAny});
  const int64_t width = grad.shape[2], count = grad.shape[0];
  const Layout layout = checked_layout(count, query_count, grid, repeat, tags, width);
  grad.expect_shape({count, token_rows(layout), width}).expect_contiguous();

  const Optional kept(kept_object, "kept"), stats(stats_object, "stats");
  const Optional patch_weight(patch_weight_object, "patch_weight"), query_weight(query_weight_object, "query_weight");
  const Optional fine(fine_object, "fine"), coarse(coarse_object, "coarse"), queries(queries_object, "queries");
  const Optional patch_sums(patch_sums_object, "patch_sums"), query_sums(query_sums_object, "query_sums");
  check(kept && stats && patch_weight && patch_sums, "kept, stats, patch_weight, patch_sums: expected tensors");
  check(layout.queries == 0 || (query_weight && query_sums), "query_weight, query_sums: expected tensors");
  check(coarse || layout.repeat == 1, "repeat: expected 1 without coarse, got ", layout.repeat);
  const DType sums = checked_sums({&fine, &coarse, &queries}, grad.dtype);
  kept.expect(grad, grad.dtype, {count, projected_rows(layout), width});
  stats.expect(grad, DType::f32, {count, projected_rows(layout), 2});
  patch_weight.expect(grad, grad.dtype, {width});
  query_weight.expect(grad, grad.dtype, {width});
  fine.expect(grad, sums, {count * patch_rows(layout), width});
  coarse.expect(grad, sums, {count * coarse_rows(layout), width});
  queries.expect(grad, sums, {count * layout.queries, width});
  const int64_t chunks = checked_extent(patch_sums->shape[0], 1, "patch_sums");
  patch_sums.expect(grad, DType::f32, {chunks, 3, width});
  query_sums.expect(grad, DType::f32, {chunks, 3, width});

  const Backward args{layout,
                      grad.data,
                      kept.data(),
                      static_cast<const float*>(stats.data()),
                      patch_weight.data(),
                      query_weight.data(),
                      fine.data(),
                      coarse.data(),
                      queries.data(),
                      static_cast<float*>(patch_sums.data()),
                      static_cast<float*>(query_sums.data()),
                      chunks,
                      grad.dtype,
                      sums};
  const py::gil_scoped_release released;
  if (grad.device == DeviceKind::cpu) return run_cpu(args, isa, threads);
#ifdef SPHINX_WITH_CUDA
  run_cuda(args, grad.device_id, grad.stream);
#endif
}

void run_layer_norm(const py::object& in_object, const py::object& weight_object, const py::object& shift_object,
                    double eps, const py::object& out_object, const std::optional<std::string>& isa_name,
                    int64_t thread_count) {
  const Isa isa = checked_isa(isa_name);
  const int threads = checked_threads(thread_count);
  const Borrow in_borrow(in_object.ptr(), "x"), out_borrow(out_object.ptr(), "out");
  const TensorView &in = *in_borrow, &out = *out_borrow;
  check_backend(out);
  out.expect_dtype({DType::f32, DType::f16, DType::bf16}).expect_shape({kAny, kAny, kAny});
  const int64_t groups = out.shape[0], rows = out.shape[1], width = out.shape[2];
  in.expect_dtype({out.dtype}).expect_shape({groups, rows, width}).expect_device_of(out);
  for (const TensorView* one : {&in, &out}) {
    check(one->numel() == 0 || width == 1 || one->strides[2] == 1, one->name,
          ": expected the last dimension without gaps, got stride ", one->strides[2]);
  }
  const int64_t extent = rows > 1 ? checked_add(checked_mul(rows - 1, out.strides[1], "out"), width, "out") : width;
  check(out.numel() == 0 || ((rows == 1 || out.strides[1] >= width) && (groups == 1 || out.strides[0] >= extent)),
        "out: expected rows that do not overlap, got strides [", out.strides[0], ", ", out.strides[1], "]");
  const Optional weight(weight_object, "weight"), shift(shift_object, "bias");
  check(weight && shift, "weight, bias: expected tensors, got None");
  weight.expect(out, out.dtype, {width});
  shift.expect(out, out.dtype, {width});
  if (out.numel() == 0) return;
  const Norm args{groups,         rows,    width,         in.strides[0], in.strides[1], out.strides[0],
                  out.strides[1], in.data, weight.data(), shift.data(),  out.data,      static_cast<float>(eps),
                  out.dtype};
  const py::gil_scoped_release released;
  if (out.device == DeviceKind::cpu) return run_cpu(args, isa, threads);
#ifdef SPHINX_WITH_CUDA
  run_cuda(args, out.device_id, out.stream);
#endif
}

#ifdef SPHINX_WITH_CUTLASS
// All products of a call: pairs of out [m, n] float32 and its segments, pairs of x [m, k] and weight [n, k]. False,
// with nothing done, where the kernels cannot compute them (gemm.h says what they need).
bool run_gemm(const py::sequence& problems) {
  GemmArgs args{};
  check(py::len(problems) >= 1 && py::len(problems) <= kMaxProblems, "problems: expected 1 to ", kMaxProblems, ", got ",
        py::len(problems));
  std::vector<py::object> kept;  // a sequence may make its items anew
  std::vector<Borrow> borrowed;
  borrowed.reserve(kMaxProblems * (1 + 2 * kMaxSegments));
  const auto borrow = [&](const py::object& object, const std::string& name) -> const TensorView& {
    kept.push_back(object);
    borrowed.emplace_back(kept.back().ptr(), name);
    const TensorView& view = *borrowed.back();
    view.expect_shape({kAny, kAny}).expect_device_of(*borrowed.front());
    check(view.shape[1] <= 1 || view.strides[1] == 1, name, ": expected the last dimension without gaps, got stride ",
          view.strides[1]);
    return view;
  };
  for (const py::handle entry : problems) {
    const auto pair = py::reinterpret_borrow<py::sequence>(entry);
    check(py::len(pair) == 2, "problems: expected pairs of out and segments, got ", py::len(pair), " items");
    const py::sequence segments = pair[1];
    check(py::len(segments) >= 1 && py::len(segments) <= kMaxSegments, "segments: expected 1 to ", kMaxSegments,
          ", got ", py::len(segments));
    const TensorView& out = borrow(pair[0], concat("out[", args.count, "]"));
    out.expect_dtype({DType::f32});
    if (args.count == 0) args.n = out.shape[1];
    out.expect_shape({kAny, args.n});
    Problem& problem = args.problems[args.count++];
    problem.m = out.shape[0];
    problem.out = out.as<float>();
    problem.ldo = out.strides[0];
    for (const py::handle segment : segments) {
      const auto operands = py::reinterpret_borrow<py::sequence>(segment);
      check(py::len(operands) == 2, "segments: expected pairs of x and weight, got ", py::len(operands), " items");
      const TensorView& x = borrow(operands[0], "x");
      const TensorView& weight = borrow(operands[1], "weight");
      if (borrowed.size() == 3) args.dtype = x.dtype;
      x.expect_dtype({args.dtype}).expect_shape({problem.m, kAny});
      weight.expect_dtype({args.dtype}).expect_shape({args.n, x.shape[1]});
      problem.segments[problem.segment_count++] = {x.data, x.strides[0], weight.data, weight.strides[0], x.shape[1]};
    }
  }
  const TensorView& on = *borrowed.front();
  check(on.device == DeviceKind::cuda, "out[0]: expected a CUDA tensor, got one on ", on.device_text());
  if (!gemm_fits(args)) return false;
  const py::gil_scoped_release released;
  run_gemm_cuda(args, on.device_id, on.stream);
  return true;
}
#endif

}  // namespace

void bind(py::module_& module) {
  module.def("fusion", &run_fusion, py::arg("fine"), py::arg("coarse"), py::arg("queries"), py::arg("out"),
             py::kw_only(), py::arg("views"), py::arg("query_count"), py::arg("grid"), py::arg("repeat"),
             py::arg("column"), py::arg("patch"), py::arg("query"), py::arg("start"), py::arg("end"), py::arg("eps"),
             py::arg("first"), py::arg("kept"), py::arg("stats"), py::arg("isa"), py::arg("threads"));
  module.def("fusion_backward", &run_backward, py::arg("grad"), py::arg("kept"), py::arg("stats"), py::kw_only(),
             py::arg("query_count"), py::arg("grid"), py::arg("repeat"), py::arg("tags"), py::arg("patch_weight"),
             py::arg("query_weight"), py::arg("fine"), py::arg("coarse"), py::arg("queries"), py::arg("patch_sums"),
             py::arg("query_sums"), py::arg("isa"), py::arg("threads"));
  module.def("layer_norm", &run_layer_norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
             py::arg("out"), py::kw_only(), py::arg("isa"), py::arg("threads"));
#ifdef SPHINX_WITH_CUTLASS
  module.def("fusion_gemm", &run_gemm, py::arg("problems"));
#endif
}

}  // namespace sphinx::fusion
