// Room attention: one decoding step of one layer over visual prefixes. Arguments and declarations.
//
// A row is one question with one new token. It attends to the prefix of its picture, which all questions on that
// picture share, and to its own suffix, the question and the answer so far:
//     out[r, h] = sum_p softmax_p(scale * rotated query[r, h] . key[p]) * value[p],   p over prefix, then suffix
// Heads share keys and values in groups of heads / kv_heads. Neighbouring rows of one picture read its prefix once.
// The new token's key and value are rotated and appended to the suffix before they are attended to.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/tensor_view.h"

namespace sphinx::attention {

// Keys and values [slots, kv_heads, capacity, head_dim]; positions from `lengths` on hold nothing.
struct Cache {
  void *key, *value;  // only a suffix is written to
  int64_t slots, capacity;
  int64_t key_slot, key_head, key_row;  // elements from one slot, head and position to the next
  int64_t value_slot, value_head, value_row;
  const int32_t* lengths;  // [slots]; NULL: all are full
};

// Angles of positions, [positions, half]: element i < half turns with element half + i, or, interleaved, 2 i with
// 2 i + 1. Elements from 2 half on keep their values.
struct Rope {
  const float *cos, *sin;  // NULL: queries and keys come rotated
  int64_t positions, half;
  bool interleaved;
};

struct Heads {                  // [rows, heads, head_dim] of queries, new keys, new values, results
  void* data;                   // NULL: none
  int64_t row_step, head_step;  // elements; head_dim lies together
};

struct Args {
  int64_t rows, heads, kv_heads, head_dim;
  Heads query, key, value, out;
  Cache prefix, suffix;      // one that is not there has no slots
  const int32_t* pictures;   // [rows] slot of the prefix, -1: none; NULL: slot r for row r
  const int32_t* questions;  // [rows] slot of the suffix; NULL: slot r for row r
  const int32_t* positions;  // [rows] of the new token; NULL: length of prefix + length of suffix
  const uint8_t* mask;       // [rows, prefix.capacity], 0: not attended to; NULL: none
  int64_t mask_step;         // bytes from one row to the next
  Rope rope;
  float scale;
  float* lse;  // [rows, heads] log(sum(exp(scores))); NULL: not wanted
  DType dtype;
};

// Indices and lengths were looked at before.
void run_cpu(const Args& args, Isa isa, int threads);

// CUDA, on `stream`, one launch; nothing is allocated, copied or waited for. Indices and lengths are read on the
// device: a row with one out of range gets nan, and nothing is read or appended for it. `partial` holds
// partial_floats(args) floats and is aligned to 16 bytes; `arrived` holds rows * kv_heads counters, zero before and
// after.
void run_cuda(const Args& args, float* partial, int32_t* arrived, int device, void* stream);
int64_t partial_floats(const Args& args);

}  // namespace sphinx::attention
