// The room views: picture -> padded, resized square (the canvas) -> normalised views. Arguments and declarations.
//
// A picture [h, w, 3] uint8 is padded to a square of side max(h, w) with a colour, without ever storing the square, and
// resized to the canvas [S, S, 3] exactly as Pillow does (S = picture_size). cut() reads the canvas and writes V views
// of side `view_size`: the picture itself when S == view_size, else the global view and the (S / view_size)^2 crops.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/tensor_view.h"

namespace sphinx::views {

constexpr int64_t kMaxSide = 1 << 20;         // of a picture
constexpr int64_t kMaxPictureSize = 1 << 14;  // of the canvas

struct Picture {
  const uint8_t* data;
  int64_t height, width;
  int64_t stride_h, stride_w, stride_c;  // in bytes
};

// Where the views of one picture go; dtype T. Optional outputs are NULL when not wanted.
struct Outputs {
  void* clip;      // [V, 3, view_size, view_size] CLIP-normalised
  void* dinov2;    // [V, 3, view_size, view_size] the same, normalised for DINOv2, or NULL
  void* convnext;  // [V, 3, convnext_size, convnext_size] nearest-resized, or NULL
  int picture_size, view_size, convnext_size;
  DType dtype;
};

void resize_cpu(const Picture& picture, uint8_t* canvas, int picture_size, int threads);
void cut_cpu(const uint8_t* canvas, const Outputs& out, int threads);

// CUDA: `workspace` is device memory of resize_workspace() bytes, aligned to 16; launches on `stream`, no host sync.
size_t resize_workspace(int64_t height, int64_t width, int picture_size);
void resize_cuda(const Picture& picture, uint8_t* canvas, int picture_size, void* workspace, int device, void* stream);
void cut_cuda(const uint8_t* canvas, const Outputs& out, int device, void* stream);

}  // namespace sphinx::views
