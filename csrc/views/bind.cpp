// The room views as Python sees it: sphinx_fast._C.views, .resize_padded and .views_workspace.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/borrow.h"
#include "common/dispatch.h"
#include "views/args.h"
#include "views/math.h"

namespace py = pybind11;

namespace sphinx::views {
namespace {

int checked_size(int64_t value, int64_t most, const char* name) {
  check(value >= 1 && value <= most, name, ": expected 1 to ", most, ", got ", value);
  return static_cast<int>(value);
}

int checked_threads(int64_t threads) {
  return checked_size(threads, 1024, "threads");
}

Picture checked_picture(const TensorView& view) {
  view.expect_dtype({DType::u8}).expect_shape({kAny, kAny, 3});
  for (int d = 0; d < 2; ++d) {
    check(view.shape[d] >= 1 && view.shape[d] <= kMaxSide, view.name, ": expected height and width of 1 to ", kMaxSide,
          ", got shape ", view.shape_text());
  }
  return {view.as<uint8_t>(), view.shape[0], view.shape[1], view.strides[0], view.strides[1], view.strides[2]};
}

// What one call needs on the device beside its outputs: the canvas of one picture, then the workspace of the largest.
int64_t canvas_bytes(int64_t picture_size) {
  return (picture_size * picture_size * 3 + 15) / 16 * 16;
}

int64_t workspace_bytes(int64_t height, int64_t width, int64_t picture_size) {
  checked_size(height, kMaxSide, "height");
  checked_size(width, kMaxSide, "width");
  const int size = checked_size(picture_size, kMaxPictureSize, "picture_size");
#ifdef SPHINX_WITH_CUDA
  return canvas_bytes(size) + static_cast<int64_t>(resize_workspace(height, width, size));
#else
  return canvas_bytes(size);
#endif
}

// The device workspace, checked against what `picture` needs.
uint8_t* checked_workspace(const std::optional<Borrow>& workspace, const TensorView& like, const Picture& picture,
                           int size) {
  check(workspace.has_value(), "workspace: expected device memory for a CUDA call, got None");
  const TensorView& view = **workspace;
  view.expect_dtype({DType::u8}).expect_shape({kAny}).expect_contiguous().expect_device_of(like);
  const int64_t need = workspace_bytes(picture.height, picture.width, size);
  check(view.shape[0] >= need, view.name, ": expected at least ", need, " bytes, got ", view.shape[0]);
  check(reinterpret_cast<uintptr_t>(view.data) % 16 == 0, view.name, ": expected memory aligned to 16 bytes");
  return view.as<uint8_t>();
}

void resize(const Picture& picture, uint8_t* canvas, int size, uint8_t* workspace, const TensorView& on, int threads) {
  if (on.device == DeviceKind::cpu) return resize_cpu(picture, canvas, size, threads);
#ifdef SPHINX_WITH_CUDA
  resize_cuda(picture, canvas, size, workspace + canvas_bytes(size), on.device_id, on.stream);
#else
  throw_no_cuda(on);
#endif
}

void cut(const uint8_t* canvas, const Outputs& out, const TensorView& on, int threads) {
  if (on.device == DeviceKind::cpu) return cut_cpu(canvas, out, threads);
#ifdef SPHINX_WITH_CUDA
  cut_cuda(canvas, out, on.device_id, on.stream);
#else
  throw_no_cuda(on);
#endif
}

void check_backend(const TensorView& on) {
#ifndef SPHINX_WITH_CUDA
  if (on.device == DeviceKind::cuda) throw_no_cuda(on);
#endif
}

std::optional<Borrow> borrow_optional(const py::object& object, const char* name) {
  if (object.is_none()) return std::nullopt;
  return Borrow(object.ptr(), name);
}

// An optional output [images, 3, side, side] in the dtype and on the device of `like`; its memory, or NULL.
void* checked_output(const std::optional<Borrow>& output, const TensorView& like, int64_t images, int64_t side) {
  if (!output) return nullptr;
  const TensorView& view = **output;
  view.expect_dtype({like.dtype}).expect_shape({images, 3, side, side}).expect_contiguous().expect_device_of(like);
  return view.data;
}

void run_views(const py::sequence& pictures, const py::object& out_object, int64_t picture_size, int64_t view_size,
               const py::object& dinov2_object, const py::object& convnext_object, const py::object& workspace_object,
               int64_t thread_count) {
  const int size = checked_size(picture_size, kMaxPictureSize, "picture_size");
  const int side = checked_size(view_size, size, "view_size");
  check(size % side == 0, "picture_size: expected a multiple of view_size ", side, ", got ", size);
  const int threads = checked_threads(thread_count);

  const Borrow out_borrow(out_object.ptr(), "out");
  const TensorView& out = *out_borrow;
  const int64_t count = static_cast<int64_t>(py::len(pictures)), per_picture = num_views(size, side);
  const int64_t images = checked_mul(count, per_picture, "pictures");
  out.expect_dtype({DType::f32, DType::f16, DType::bf16}).expect_shape({images, 3, side, side}).expect_contiguous();
  check_backend(out);

  const auto dinov2 = borrow_optional(dinov2_object, "dinov2");
  const auto convnext = borrow_optional(convnext_object, "convnext");
  const auto workspace = borrow_optional(workspace_object, "workspace");
  int convnext_size = 0;
  if (convnext) {
    (*convnext)->expect_shape({images, 3, kAny, kAny});
    convnext_size = checked_size((*convnext)->shape[3], kMaxPictureSize, "convnext");
  }
  char* outputs[3] = {out.as<char>(), static_cast<char*>(checked_output(dinov2, out, images, side)),
                      static_cast<char*>(checked_output(convnext, out, images, convnext_size))};
  const int64_t item = item_size(out.dtype) * per_picture * 3;
  const int64_t steps[3] = {item * side * side, item * side * side, item * convnext_size * convnext_size};

  // Everything is checked before anything is written.
  std::vector<Borrow> borrowed;  // keeps the memory of the pictures
  std::vector<Picture> checked;
  borrowed.reserve(count);
  checked.reserve(count);
  uint8_t* canvas = nullptr;
  for (int64_t b = 0; b < count; ++b) {
    const py::object object = pictures[b];
    borrowed.emplace_back(object.ptr(), concat("pictures[", b, "]"));
    checked.push_back(checked_picture(*borrowed.back()));
    borrowed.back()->expect_device_of(out);
    if (out.device == DeviceKind::cuda) canvas = checked_workspace(workspace, out, checked.back(), size);
  }

  const py::gil_scoped_release released;
  std::vector<uint8_t> host_canvas;
  if (out.device == DeviceKind::cpu) {
    host_canvas.resize(static_cast<size_t>(size) * size * 3);
    canvas = host_canvas.data();
  }
  for (int64_t b = 0; b < count; ++b) {
    Outputs one{outputs[0], outputs[1], outputs[2], size, side, convnext_size, out.dtype};
    resize(checked[b], canvas, size, canvas, out, threads);
    cut(canvas, one, out, threads);
    for (int i = 0; i < 3; ++i) {
      if (outputs[i]) outputs[i] += steps[i];
    }
  }
}

void run_resize(const py::object& picture_object, const py::object& out_object, const py::object& workspace_object,
                int64_t thread_count) {
  const int threads = checked_threads(thread_count);
  const Borrow out_borrow(out_object.ptr(), "out"), picture_borrow(picture_object.ptr(), "picture");
  const TensorView& out = *out_borrow;
  out.expect_dtype({DType::u8}).expect_shape({kAny, kAny, 3}).expect_contiguous();
  const int size = checked_size(out.shape[0], kMaxPictureSize, "out");
  out.expect_shape({size, size, 3});
  check_backend(out);
  const Picture picture = checked_picture(*picture_borrow);
  picture_borrow->expect_device_of(out);
  const auto workspace = borrow_optional(workspace_object, "workspace");
  uint8_t* scratch = out.device == DeviceKind::cuda ? checked_workspace(workspace, out, picture, size) : nullptr;

  const py::gil_scoped_release released;
  resize(picture, out.as<uint8_t>(), size, scratch, out, threads);
}

}  // namespace

void bind(py::module_& module) {
  module.def("views", &run_views, py::arg("pictures"), py::arg("out"), py::kw_only(), py::arg("picture_size"),
             py::arg("view_size"), py::arg("dinov2"), py::arg("convnext"), py::arg("workspace"), py::arg("threads"));
  module.def("resize_padded", &run_resize, py::arg("picture"), py::arg("out"), py::kw_only(), py::arg("workspace"),
             py::arg("threads"));
  module.def("views_workspace", &workspace_bytes, py::arg("height"), py::arg("width"), py::arg("picture_size"));
}

}  // namespace sphinx::views
