// The kernels of the room fusion on eight threads a block, to be run under ThreadSanitizer. The argument names a
// barrier that is left out, counted as they stand in the sources: the sanitizer must notice.
#include <cuda_runtime.h>  // host_cuda's

#include <cstdio>
#include <cstdlib>

namespace {

int left_out = -1;

template <int kBarrier>
void barrier() {
  if (kBarrier != left_out) __syncthreads();
}

}  // namespace

constexpr int kBarriersBefore = __COUNTER__ + 1;
#define __syncthreads() barrier<__COUNTER__ - kBarriersBefore>()
#include "host_fusion.cpp"
#undef __syncthreads
constexpr int kBarriers = __COUNTER__ - kBarriersBefore;

namespace {

std::vector<float> floats(int64_t count) {
  std::vector<float> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = static_cast<float>(i * 37 % 101) - 50;
  return made;
}

bool run() {
  const int64_t layout[] = {2, 2, 4, 2, 1, 41};
  const int64_t views = 2, width = 41, patches = 17, coarses = 5, queries = 2, projected = 19, tokens = 21, chunks = 3;
  auto fine = floats(views * patches * width), coarse = floats(views * coarses * width);
  auto query = floats(views * queries * width), vector = floats(width), grad = floats(views * tokens * width);
  std::vector<float> out(grad.size()), kept(views * projected * width), stats(views * projected * 2);
  std::vector<float> patch_sums(chunks * 3 * width), query_sums(patch_sums);
  const float* const v = vector.data();
  const void* const given[] = {fine.data(), coarse.data(), query.data(), v, v, v, v, v, v, v, v};
  void* const tokens_to[] = {out.data(), kept.data(), stats.data()};
  const int64_t first[] = {0, tokens};
  const bool forward = forward_on_host(layout, given, tokens_to, views * tokens, width, first, 1e-5f, 0, 0, 8) == 1;
  const void* const back[] = {grad.data(), kept.data(), stats.data(), v, v};
  void* const sums[] = {fine.data(), coarse.data(), query.data(), patch_sums.data(), query_sums.data()};
  const bool backward = backward_on_host(layout, back, sums, chunks, 0, 0, 8) == 1;
  const int64_t shape[] = {views, tokens, width}, strides[] = {tokens * width, width, tokens * width, width};
  return forward && backward && norm_on_host(shape, strides, out.data(), v, v, out.data(), 1e-5f, 0, 8) == 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) left_out = std::atoi(arguments[1]);
  std::puts(run() ? "done" : "left its shared memory");
  std::printf("%d barriers\n", kBarriers);
}
