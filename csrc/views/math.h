// The arithmetic of the room views, shared by host and device. Every rounding here is deliberate: compile without
// contracting a * b + c (CMakeLists.txt does).
#pragma once

#include <cmath>
#include <cstdint>

#include "common/float16.h"

namespace sphinx::views {

// --- Pillow's bicubic (a = -0.5, antialiased) in 22-bit fixed point -------------------------------------------------
// Source: the behaviour of PIL.Image.resize(size, BICUBIC) for 8-bit pictures.
constexpr int kWeightBits = 22;

SPHINX_HD double bicubic(double x) {
  const double a = -0.5;
  x = x < 0 ? -x : x;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

struct Filter {
  int64_t in;      // extent before
  double scale;    // in / out
  double support;  // half-width of the window, in input pixels
  double stretch;  // 1 / max(scale, 1)
  int max_taps;
};

SPHINX_HD Filter make_filter(int64_t in, int64_t out) {
  Filter filter;
  filter.in = in;
  filter.scale = static_cast<double>(in) / static_cast<double>(out);
  const double filter_scale = filter.scale < 1 ? 1 : filter.scale;
  filter.support = 2 * filter_scale;
  filter.stretch = 1 / filter_scale;
  filter.max_taps = static_cast<int>(ceil(filter.support)) * 2 + 1;
  return filter;
}

// The input pixels [first, first + count) that output pixel `x` reads.
struct Window {
  int32_t first, count;
};

SPHINX_HD double window_center(const Filter& filter, int64_t x) {
  return (static_cast<double>(x) + 0.5) * filter.scale;
}

SPHINX_HD Window window_of(const Filter& filter, int64_t x) {
  const double center = window_center(filter, x);
  int64_t first = static_cast<int64_t>(center - filter.support + 0.5);
  int64_t end = static_cast<int64_t>(center + filter.support + 0.5);
  first = first < 0 ? 0 : first;
  end = end > filter.in ? filter.in : end;
  return {static_cast<int32_t>(first), static_cast<int32_t>(end - first)};
}

// A weight of the window in fixed point; `sum` is window_sum.
SPHINX_HD int32_t fixed_weight(double weight, double sum) {
  if (sum != 0) weight /= sum;
  return static_cast<int32_t>(weight * (1 << kWeightBits) + (weight < 0 ? -0.5 : 0.5));
}

SPHINX_HD double window_weight(const Filter& filter, int64_t x, Window window, int i) {
  return bicubic((i + window.first - window_center(filter, x) + 0.5) * filter.stretch);
}

SPHINX_HD double window_sum(const Filter& filter, int64_t x, Window window) {
  double sum = 0;
  for (int i = 0; i < window.count; ++i) sum += window_weight(filter, x, window, i);
  return sum;
}

constexpr int32_t kRoundHalf = 1 << (kWeightBits - 1);  // what an accumulator starts from

SPHINX_HD uint8_t clip8(int32_t accumulator) {
  const int32_t value = accumulator >> kWeightBits;
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// --- the padded square ----------------------------------------------------------------------------------------------
SPHINX_HD uint8_t pad_colour(int c) {
  return static_cast<uint8_t>(c == 0 ? 122 : c == 1 ? 116 : 104);
}

// Rows above (or columns left of) the picture in the square.
SPHINX_HD int64_t pad_before(int64_t side, int64_t extent) {
  return (side - extent) / 2;
}

// A window split into picture and padding. The padding is one value along an axis, so all of it is one product: the
// sums are integers, exact in any order, and pictures far from square cost no more than their pixels.
struct Tap {
  int32_t first, count;  // pixels of the picture, in its own coordinates
  int32_t skip;          // weights before those of the picture
  int32_t pad, total;    // sum of the padding's weights, and of all
};

// Output pixel x: `weight_at(i)` gives the window's weights, each once and in order.
template <class WeightAt>
SPHINX_HD Tap split_window(Window window, int64_t before, int64_t extent, const WeightAt& weight_at) {
  const int64_t left = window.first - before, right = left + window.count;
  const int64_t first = left > 0 ? left : 0, end = right < extent ? right : extent;
  Tap tap{static_cast<int32_t>(first), static_cast<int32_t>(end > first ? end - first : 0), 0, 0, 0};
  tap.skip = tap.count ? static_cast<int32_t>(first - left) : 0;
  for (int i = 0; i < window.count; ++i) {
    const int32_t weight = weight_at(i);
    tap.total += weight;
    tap.pad += i >= tap.skip && i < tap.skip + tap.count ? 0 : weight;
  }
  return tap;
}

// --- normalisation --------------------------------------------------------------------------------------------------
SPHINX_HD float clip_mean(int c) {
  return c == 0 ? 0.48145466f : c == 1 ? 0.4578275f : 0.40821073f;
}
SPHINX_HD float clip_std(int c) {
  return c == 0 ? 0.26862954f : c == 1 ? 0.26130258f : 0.27577711f;
}
SPHINX_HD float dinov2_mean(int c) {
  return c == 0 ? 0.485f : c == 1 ? 0.456f : 0.406f;
}
SPHINX_HD float dinov2_std(int c) {
  return c == 0 ? 0.229f : c == 1 ? 0.224f : 0.225f;
}

// (u8 / 255 - mean) / std, each operation rounded to fp32, as ToTensor and Normalize do.
SPHINX_HD float normalise(int value, int c) {
  return (static_cast<float>(value) / 255.0f - clip_mean(c)) / clip_std(c);
}

// CLIP-normalised -> DINOv2-normalised: (x * clip_std + clip_mean - mean) / std, constants and results rounded to T.
template <class T>
SPHINX_HD T dinov2_of(T x, int c) {
  float y = rounded<T>(to_float(x) * rounded<T>(clip_std(c)));
  y = rounded<T>(y + rounded<T>(clip_mean(c)));
  y = rounded<T>(y - rounded<T>(dinov2_mean(c)));
  return from_float<T>(y / rounded<T>(dinov2_std(c)));
}

// --- bicubic without antialiasing (a = -0.75) of the fp16 picture ---------------------------------------------------
// What F.interpolate(x.half(), size, mode="bicubic") computes on a CPU: four taps per axis, weights rounded to fp16,
// horizontal sums and vertical sums in fp32 in the order of four_taps, the result rounded to fp16. At an even whole
// ratio the weights are [-3, 19, 19, -3] / 32, at an odd one [0, 1, 0, 0].
struct FourTaps {
  int32_t index[4];  // clamped to the picture
  float weight[4];
};

SPHINX_HD int clamp_index(int i, int extent) {
  return i < 0 ? 0 : i >= extent ? extent - 1 : i;
}

// The cubic for distances below 1, and from 1 to 2.
SPHINX_HD float cubic_near(float x) {
  const float a = -0.75f;
  return ((a + 2) * x - (a + 3)) * x * x + 1;
}
SPHINX_HD float cubic_far(float x) {
  const float a = -0.75f;
  return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
}

SPHINX_HD FourTaps four_taps_of(int i, int in, int out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  const float at = scale * (static_cast<float>(i) + 0.5f) - 0.5f, below = floorf(at), t = at - below;
  FourTaps taps{};
  for (int k = 0; k < 4; ++k) taps.index[k] = clamp_index(static_cast<int>(below) - 1 + k, in);
  taps.weight[0] = rounded<Half>(cubic_far(t + 1));
  taps.weight[1] = rounded<Half>(cubic_near(t));
  taps.weight[2] = rounded<Half>(cubic_near(1 - t));
  taps.weight[3] = rounded<Half>(cubic_far(2 - t));
  return taps;
}

// a * b + c, rounded once: exact in double for the magnitudes here.
SPHINX_HD float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return fmaf(a, b, c);
#else
  return static_cast<float>(static_cast<double>(a) * b + c);
#endif
}

SPHINX_HD float four_taps(float p0, float p1, float p2, float p3, const float* weight) {
  return fused(p3, weight[3], fused(p2, weight[2], fused(p0, weight[0], p1 * weight[1])));
}

// --- nearest resize, as torch's interpolate(mode="nearest") ---------------------------------------------------------
SPHINX_HD int nearest_index(int i, int in, int out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  const int source = static_cast<int>(floorf(static_cast<float>(i) * scale));
  return source < in - 1 ? source : in - 1;
}

// --- views ----------------------------------------------------------------------------------------------------------
SPHINX_HD int num_views(int picture_size, int view_size) {
  const int ratio = picture_size / view_size;
  return ratio == 1 ? 1 : 1 + ratio * ratio;
}

// Top left corner in the canvas of view v >= 1, row-major; of the only view when the ratio is 1.
struct Corner {
  int y, x;
};

SPHINX_HD Corner crop_corner(int v, int ratio, int view_size) {
  if (ratio == 1) return {0, 0};
  return {(v - 1) / ratio * view_size, (v - 1) % ratio * view_size};
}

}  // namespace sphinx::views
