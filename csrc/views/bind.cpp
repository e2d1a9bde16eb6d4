// The room views as Python sees it: sphinx_fast._C.views, and the names of the CPU's loops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/borrow.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "views/args.h"
#include "views/math.h"

namespace py = pybind11;

namespace sphinx::views {
namespace {

int checked_size(int64_t value, int64_t most, const char* name) {
  check(value >= 1 && value <= most, name, ": expected 1 to ", most, ", got ", value);
  return static_cast<int>(value);
}

// --- one picture's geometry: kNumbers integers, in the order of sphinx_fast.image.geometry.Geometry
// -------------------
constexpr int kNumbers = 13;

struct Placement {  // of both axes: y, then x
  int64_t region[2], extent[2], plane[2], offset[2], resized[2], origin[2], vertical_first;
};

Axis checked_axis(const Placement& p, int axis, int64_t picture_extent, int size, const std::string& name) {
  check(p.extent[axis] >= 1 && p.region[axis] >= 0 && p.region[axis] <= picture_extent - p.extent[axis], name,
        ": expected a region inside the picture, got [", p.region[axis], ", ", p.region[axis], " + ", p.extent[axis],
        ") of ", picture_extent);
  check(p.plane[axis] >= 1 && p.plane[axis] <= kMaxSide, name, ": expected a plane of 1 to ", kMaxSide, ", got ",
        p.plane[axis]);
  check(p.offset[axis] >= 0 && p.offset[axis] <= p.plane[axis] - p.extent[axis], name,
        ": expected the region to lie in the plane, got ", p.offset[axis], " + ", p.extent[axis], " of ",
        p.plane[axis]);
  check(p.resized[axis] >= 1 && p.resized[axis] <= kMaxSide, name, ": expected a resized extent of 1 to ", kMaxSide,
        ", got ", p.resized[axis]);
  check(p.origin[axis] >= 0 && p.origin[axis] <= p.resized[axis] - size, name,
        ": expected the canvas to lie in the resized plane, got ", p.origin[axis], " + ", size, " of ",
        p.resized[axis]);
  return {p.plane[axis], p.offset[axis], p.extent[axis], static_cast<int>(p.resized[axis]),
          static_cast<int>(p.origin[axis])};
}

// Picture and geometry of one job, checked against each other.
Job checked_job(const TensorView& view, const int64_t* numbers, int size) {
  view.expect_dtype({DType::u8}).expect_shape({kAny, kAny, 3});
  for (int d = 0; d < 2; ++d) {
    check(view.shape[d] >= 1 && view.shape[d] <= kMaxSide, view.name, ": expected height and width of 1 to ", kMaxSide,
          ", got shape ", view.shape_text());
  }
  const Placement p{{numbers[0], numbers[1]},
                    {numbers[2], numbers[3]},
                    {numbers[4], numbers[5]},
                    {numbers[6], numbers[7]},
                    {numbers[8], numbers[9]},
                    {numbers[10], numbers[11]},
                    numbers[12]};
  Job job{};
  job.geometry.y = checked_axis(p, 0, view.shape[0], size, view.name);
  job.geometry.x = checked_axis(p, 1, view.shape[1], size, view.name);
  job.geometry.vertical_first = p.vertical_first != 0;
  check(!job.geometry.vertical_first || (p.plane[0] == p.extent[0] && p.plane[1] == p.extent[1]), view.name,
        ": expected no padding where the vertical pass goes first");
  job.picture = {view.as<uint8_t>() + p.region[0] * view.strides[0] + p.region[1] * view.strides[1],
                 p.extent[0],
                 p.extent[1],
                 view.strides[0],
                 view.strides[1],
                 view.strides[2]};
  return job;
}

// --- outputs
// ----------------------------------------------------------------------------------------------------------
// The side of an output [images, 3, side, side] like `like`; 0 where it is not wanted.
int checked_output(const Optional& output, const TensorView& like, int64_t images, int64_t most) {
  if (!output) return 0;
  const TensorView& view = *output;
  view.expect_dtype({like.dtype}).expect_shape({images, 3, kAny, kAny}).expect_contiguous().expect_device_of(like);
  const int side = checked_size(view.shape[3], most, view.name.c_str());
  view.expect_shape({images, 3, side, side});
  return side;
}

char* memory_of(const Optional& output) {
  return output ? output->as<char>() : nullptr;
}

void run_views(const py::sequence& pictures, const std::vector<int64_t>& geometry, int64_t picture_size,
               int64_t view_size, const py::object& clip_object, const py::object& dinov2_object,
               const py::object& convnext_object, const py::object& canvas_object,
               const std::optional<std::string>& isa_name, int64_t thread_count) {
  const int size = checked_size(picture_size, kMaxPictureSize, "picture_size");
  const int side = checked_size(view_size, size, "view_size");
  check(size % side == 0, "picture_size: expected a multiple of view_size ", side, ", got ", size);
  const int threads = checked_threads(thread_count);
  const Isa isa = checked_isa(isa_name);

  const int64_t count = static_cast<int64_t>(py::len(pictures)), views = num_views(size, side);
  const int64_t images = checked_mul(count, views, "pictures");
  check(static_cast<int64_t>(geometry.size()) == checked_mul(count, kNumbers, "pictures"), "geometry: expected ",
        kNumbers, " numbers for each of ", count, " pictures, got ", geometry.size());

  const Optional clip(clip_object, "out"), dinov2(dinov2_object, "dinov2");
  const Optional convnext(convnext_object, "convnext"), canvas(canvas_object, "canvas");
  check(clip || (canvas && !dinov2 && !convnext), "out: expected a tensor, got None");
  const TensorView& on = clip ? *clip : *canvas;
  check_backend(on);
  Outputs sizes{nullptr, nullptr, nullptr, size, side, 0, 0, DType::f32};
  if (clip) {
    on.expect_dtype({DType::f32, DType::f16, DType::bf16}).expect_shape({images, 3, side, side}).expect_contiguous();
    sizes.dtype = on.dtype;
    sizes.dinov2_size = checked_output(dinov2, on, images, kMaxPictureSize / (size / side));
    sizes.convnext_size = checked_output(convnext, on, images, kMaxPictureSize);
  }
  if (canvas) {
    canvas->expect_dtype({DType::u8}).expect_shape({count, size, size, 3}).expect_contiguous().expect_device_of(on);
  }

  // Everything is checked before anything is written.
  std::vector<py::object> kept;  // a sequence may make its items anew
  std::vector<Borrow> borrowed;  // keeps the memory of the pictures
  std::vector<Job> jobs;
  borrowed.reserve(count);
  jobs.reserve(count);
  const int64_t image = item_size(sizes.dtype) * views * 3;  // bytes of a picture's views, per pixel of a view
  for (int64_t b = 0; b < count; ++b) {
    kept.push_back(pictures[b]);
    borrowed.emplace_back(kept.back().ptr(), concat("pictures[", b, "]"));
    borrowed.back()->expect_device_of(on);
    Job job = checked_job(*borrowed.back(), geometry.data() + b * kNumbers, size);
    job.out = sizes;
    const auto part = [&](const Optional& output, int64_t bytes) -> void* {
      return output ? memory_of(output) + b * bytes : nullptr;
    };
    job.out.clip = part(clip, image * side * side);
    job.out.dinov2 = part(dinov2, image * sizes.dinov2_size * sizes.dinov2_size);
    job.out.convnext = part(convnext, image * sizes.convnext_size * sizes.convnext_size);
    job.canvas = static_cast<uint8_t*>(part(canvas, static_cast<int64_t>(size) * size * 3));
    jobs.push_back(job);
  }

  const py::gil_scoped_release released;
  if (on.device == DeviceKind::cpu) return run_cpu(jobs.data(), count, isa, threads);
#ifdef SPHINX_WITH_CUDA
  run_cuda(jobs.data(), count, on.device_id, on.stream);
#endif
}

}  // namespace

void bind(py::module_& module) {
  module.def("views", &run_views, py::arg("pictures"), py::arg("geometry"), py::kw_only(), py::arg("picture_size"),
             py::arg("view_size"), py::arg("out"), py::arg("dinov2"), py::arg("convnext"), py::arg("canvas"),
             py::arg("isa"), py::arg("threads"));
}

}  // namespace sphinx::views
