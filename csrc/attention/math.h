// Which row attends to what, splits, rotation and the merge of splits: shared by CPU and GPU, tested without a GPU.
#pragma once

#include <cmath>

#include "attention/args.h"
#include "common/float16.h"
#include "common/host_device.h"

namespace sphinx::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

SPHINX_HD int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// What a row attends to.
struct Row {
  int64_t picture, question;  // slots; -1: none
  int64_t prefix, suffix;     // positions; the suffix counts the new one
  int64_t position;           // of the new token, for its rotation
  bool valid;                 // every index and length is in range
};

SPHINX_HD int64_t length_of(const Cache& cache, int64_t slot) {
  return slot < 0 ? 0 : cache.lengths ? cache.lengths[slot] : cache.capacity;
}

SPHINX_HD Row row_of(const Args& args, int64_t r) {
  Row row{};
  row.picture = args.prefix.slots == 0 ? -1 : args.pictures ? args.pictures[r] : r;
  row.question = args.suffix.slots == 0 ? -1 : args.questions ? args.questions[r] : r;
  row.valid = row.picture >= -1 && row.picture < args.prefix.slots && row.question < args.suffix.slots &&
              (row.question >= 0 || args.suffix.slots == 0);
  if (!row.valid) return row;
  row.prefix = length_of(args.prefix, row.picture);
  const int64_t held = length_of(args.suffix, row.question), appended = args.key.data ? 1 : 0;
  row.suffix = held + appended;
  row.position = args.positions ? args.positions[r] : row.prefix + held;
  row.valid = row.prefix >= 0 && row.prefix <= args.prefix.capacity && held >= 0 &&
              row.suffix <= args.suffix.capacity &&
              (!args.rope.cos || (row.position >= 0 && row.position < args.rope.positions));
  return row;
}

// Rows that read a prefix together: [first, first + result), neighbours of one picture, none across a multiple of
// `most`. 0 where `first` is not the first of such a group.
SPHINX_HD int64_t group_of(const Args& args, int64_t first, int64_t most) {
  const auto picture = [&](int64_t r) { return args.pictures ? args.pictures[r] : r; };
  if (first % most != 0 && picture(first) == picture(first - 1)) return 0;
  int64_t end = first + 1;
  while (end < args.rows && end % most != 0 && picture(end) == picture(first)) ++end;
  return end - first;
}

// Element i of a head of `from`, rotated to `position`, in float32; rounded once by whoever keeps it.
template <class T>
SPHINX_HD float rotated_at(const T* from, int64_t i, const Rope& rope, int64_t position) {
  const float own = to_float(from[i]);
  if (!rope.cos || i >= 2 * rope.half) return own;
  const bool second = rope.interleaved ? i % 2 != 0 : i >= rope.half;
  const int64_t pair = rope.interleaved ? i / 2 : second ? i - rope.half : i;
  const int64_t other = rope.interleaved ? i ^ 1 : second ? i - rope.half : i + rope.half;
  const float cos = rope.cos[position * rope.half + pair], sin = rope.sin[position * rope.half + pair];
  const float turned = to_float(from[other]) * sin;
  return second ? own * cos + turned : own * cos - turned;
}

// A softmax that is not finished: largest score, in units of log 2, and sum of exp2(score - largest). Nothing attended
// to: -inf and 0.
struct Softmax {
  float largest, sum;
};

// exp2(of - to); 0 where `of` is -inf, also when both are.
SPHINX_HD float share(float of, float to) {
  return of == -INFINITY ? 0.0f : exp2f(of - to);
}

// Adds `other` to `all`; what each has summed is to be multiplied by its weight. Splits are merged in the order of
// their positions: results depend on nothing else.
struct Weights {
  float all, other;
};
SPHINX_HD Weights merge(Softmax& all, const Softmax& other) {
  const float largest = other.largest > all.largest ? other.largest : all.largest;
  const Weights weights{share(all.largest, largest), share(other.largest, largest)};
  all = {largest, all.sum * weights.all + other.sum * weights.other};
  return weights;
}

SPHINX_HD float log_sum_exp(const Softmax& of) {
  return of.sum == 0 ? -INFINITY : (of.largest + log2f(of.sum)) * kLn2;
}

}  // namespace sphinx::attention
