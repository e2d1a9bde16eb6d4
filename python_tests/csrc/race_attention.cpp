// The kernels of the room attention, to be run under ThreadSanitizer. The argument names a barrier that is left out,
// counted as they stand in the sources: the sanitizer must notice.
#include <cuda_runtime.h>  // host_cuda's
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

// Without a barrier threads may part and wait for each other for ever: the first race is enough.
extern "C" const char* __tsan_default_options() {
  return "halt_on_error=1";
}

namespace {

int left_out = -1;

template <int kBarrier>
void barrier() {
  if (kBarrier != left_out) __syncthreads();
}

// A block that sees the count may merge at once: whoever counts reads all that has been left so far.
const float* left = nullptr;
int64_t left_count = 0;
thread_local volatile float looked_at = 0;

int count_and_look(int32_t* to, int value) {
  const int before = atomicAdd(to, value);
  for (int64_t i = 0; i < left_count; ++i) looked_at = left[i];
  return before;
}

}  // namespace

constexpr int kBarriersBefore = __COUNTER__ + 1;
#define __syncthreads() barrier<__COUNTER__ - kBarriersBefore>()
#define atomicAdd count_and_look
#include "host_attention.cpp"
#undef atomicAdd
#undef __syncthreads
constexpr int kBarriers = __COUNTER__ - kBarriersBefore;

namespace {

// Two pictures and three questions, several pieces of work for a block.
template <class T>
bool run(DType dtype, int64_t head_dim) {
  const int64_t rows = 3, heads = 2, prefix = 40, suffix = 8;
  std::vector<T> query(rows * heads * head_dim, T{}), key(query), value(query), out(query);
  std::vector<T> prefixes(2 * 2 * heads * prefix * head_dim, T{}), suffixes(2 * rows * heads * suffix * head_dim, T{});
  const int32_t lengths[] = {33, 7}, held[] = {0, 2, 5}, pictures[] = {0, 0, 1};
  std::vector<uint8_t> mask(rows * prefix, 1);
  std::vector<float> cos(64 * head_dim / 2, 0.5f), lse(rows * heads);
  Args args{};
  args.rows = rows, args.heads = heads, args.kv_heads = heads, args.head_dim = head_dim;
  const auto heads_of = [&](std::vector<T>& of) { return Heads{of.data(), heads * head_dim, head_dim}; };
  args.query = heads_of(query), args.key = heads_of(key), args.value = heads_of(value), args.out = heads_of(out);
  const auto cache_of = [&](std::vector<T>& of, int64_t slots, int64_t capacity, const int32_t* lengths) {
    const int64_t head = capacity * head_dim, slot = heads * head;
    return Cache{of.data(), of.data() + of.size() / 2, slots, capacity, slot, head, head_dim, slot, head, head_dim,
                 lengths};
  };
  args.prefix = cache_of(prefixes, 2, prefix, lengths), args.suffix = cache_of(suffixes, rows, suffix, held);
  args.pictures = pictures, args.mask = mask.data(), args.mask_step = prefix;
  args.rope = {cos.data(), cos.data(), 64, head_dim / 2, false};
  args.scale = 1, args.lse = lse.data(), args.dtype = dtype;
  std::vector<float> partial(partial_floats_of(&args));
  std::vector<int32_t> arrived(rows * heads);
  left = partial.data(), left_count = static_cast<int64_t>(partial.size());
  return attention_on_host(&args, partial.data(), arrived.data(), 1, 1, 0) == 1;
}

}  // namespace

int main(int count, char** arguments) {
  alarm(100);
  if (count > 1) left_out = std::atoi(arguments[1]);
  const bool kept = run<Half>(DType::f16, 64) && run<float>(DType::f32, 8);
  std::puts(kept ? "done" : "left its shared memory");
  std::printf("%d barriers\n", kBarriers);
}
