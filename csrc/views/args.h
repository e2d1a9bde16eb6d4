// The room views: picture -> canvas -> views. Arguments and declarations.
//
// The canvas is the resized picture [S, S, 3] uint8, S = picture_size, exactly as Pillow's bicubic makes it. A Geometry
// says how the picture becomes the canvas: padded to a square, or a region of it resized. The views are cut from the
// canvas: the canvas itself when S == view_size, else the global view and the (S / view_size)^2 crops.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "common/tensor_view.h"

namespace sphinx::views {

constexpr int64_t kMaxSide = 1 << 20;         // of a picture, and of the plane it is set into
constexpr int64_t kMaxPictureSize = 1 << 14;  // of the canvas

// What is read of a picture: a rectangle of packed or strided pixels.
struct Picture {
  const uint8_t* data;
  int64_t height, width;
  int64_t stride_h, stride_w, stride_c;  // in bytes
};

// One axis: the picture lies at [before, before + extent) of a plane of `in` pixels, the rest is padding; the plane is
// resized to `out` pixels, of which [begin, begin + S) is the canvas.
struct Axis {
  int64_t in, before, extent;
  int out, begin;
};

struct Geometry {
  Axis y, x;
  bool vertical_first;  // the order of Pillow's two passes; then nothing is padded
};

// Where the views of one picture go; dtype T. Optional outputs are NULL when not wanted.
struct Outputs {
  void* clip;      // [V, 3, view_size, view_size] CLIP-normalised
  void* dinov2;    // [V, 3, dinov2_size, dinov2_size] the same for DINOv2, or NULL
  void* convnext;  // [V, 3, convnext_size, convnext_size], or NULL
  int picture_size, view_size, dinov2_size, convnext_size;
  DType dtype;
};

struct Job {
  Picture picture;
  Geometry geometry;
  uint8_t* canvas;  // [S, S, 3], or NULL when not wanted
  Outputs out;      // all NULL when only the canvas is wanted; sizes and dtype are the same for all jobs of a call
};

// All instruction sets give the same bits.
void run_cpu(const Job* jobs, int64_t count, Isa isa, int threads);

// CUDA: one launch for up to kLarge jobs (kernel.cuh) on `stream`; nothing is allocated, copied or waited for.
void run_cuda(const Job* jobs, int64_t count, int device, void* stream);

}  // namespace sphinx::views
