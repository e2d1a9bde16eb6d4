// The kernel of the room views on eight threads a block, to be run under ThreadSanitizer: rows first and columns first,
// with tables and without.
#include <cstdio>

#include "host_views.cpp"

namespace {

struct Case {
  int64_t height, width;
  int64_t axes[10];  // in, before, extent, out, begin of y and of x
  int vertical_first;
};

bool runs(const std::vector<Case>& cases, int size, int side, int convnext) {
  std::vector<std::vector<uint8_t>> memory;
  std::vector<const uint8_t*> pixels;
  std::vector<int64_t> strides, axes;
  std::vector<int> vertical_first;
  for (const Case& one : cases) {
    memory.emplace_back(one.height * one.width * 3);
    for (size_t i = 0; i < memory.back().size(); ++i) memory.back()[i] = static_cast<uint8_t>(i * 37);
    pixels.push_back(memory.back().data());
    strides.insert(strides.end(), {one.width * 3, 3, 1});
    axes.insert(axes.end(), one.axes, one.axes + 10);
    vertical_first.push_back(one.vertical_first);
  }
  const size_t count = cases.size(), views = num_views(size, side);
  std::vector<uint8_t> canvas(count * size * size * 3);
  std::vector<float> clip(count * views * 3 * side * side), dinov2(clip.size());
  std::vector<float> nearest(count * views * 3 * convnext * convnext);
  return views_on_host(static_cast<int>(count), pixels.data(), strides.data(), axes.data(), vertical_first.data(), size,
                       side, side, convnext, 0, 8, canvas.data(), clip.data(), dinov2.data(), nearest.data()) == 1;
}

}  // namespace

int main() {
  const bool tabled = runs(
      {{120, 300, {300, 90, 120, 84, 0, 300, 0, 300, 84, 0}, 0}, {200, 60, {200, 0, 200, 84, 0, 60, 0, 60, 84, 0}, 1}},
      84, 42, 48);
  const bool direct = runs({{3000, 2, {3000, 0, 3000, 5, 0, 3000, 1499, 2, 5, 0}, 0}}, 5, 5, 5);
  std::puts(tabled && direct ? "done" : "left its shared memory");
}
