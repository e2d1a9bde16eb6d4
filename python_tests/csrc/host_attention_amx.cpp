// The loops of the room attention for AMX over tiles in software, and those for AVX-512, as a C library for ctypes.
#include <vector>

#include "attention/amx.h"  // host_amx's
#include "attention/rows_amx.cpp"
#include "attention/rows_avx512.cpp"

using namespace sphinx;
using namespace sphinx::attention;

namespace {

thread_local char message[100];

// "" or what went wrong.
template <class F>
const char* told(F&& f) {
  message[0] = 0;
  try {
    f();
  } catch (const std::logic_error& error) {
    std::strncpy(message, error.what(), sizeof(message) - 1);
  }
  return message;
}

Config config_of(int rows, int bytes) {
  Config config;
  std::fill_n(config.rows, 8, rows);
  std::fill_n(config.bytes, 8, bytes);
  return config;
}

}  // namespace

extern "C" {

int64_t size_of_keys() {
  return sizeof(Keys);
}

// bfloat16 queries [queries, head_dim], not rotated.
const char* attend(int tiles, int one_chain, const void* query, int64_t queries, int64_t head_dim, const Keys* keys,
                   float* softmax, float* out) {
  amx::state.products = 0;
  amx::state.one_chain = one_chain;
  return told([&] {
    const RowsOf& loops = (tiles ? rows_amx() : rows_avx512()).of[2];
    std::vector<float> own(queries * head_dim);
    for (int64_t m = 0; m < queries; ++m) {
      loops.rotate_query(static_cast<const BFloat16*>(query) + m * head_dim, head_dim, Rope{}, 0, keys->factor,
                         own.data() + m * head_dim);
    }
    loops.attend(own.data(), queries, head_dim, *keys, reinterpret_cast<Softmax*>(softmax), out);
  });
}
int64_t products() {
  return amx::state.products;
}
int in_use() {
  return amx::state.palette;
}

// The other dtypes, and all but the products of bfloat16, are those of AVX-512.
int shared_loops() {
  const Rows &ours = rows_amx(), &theirs = rows_avx512();
  int same = 0;
  for (int i = 0; i < 3; ++i) {
    same += (ours.of[i].attend == theirs.of[i].attend) + (ours.of[i].rotate == theirs.of[i].rotate) +
            (ours.of[i].rotate_query == theirs.of[i].rotate_query) + (ours.of[i].fold == theirs.of[i].fold) +
            (ours.of[i].scale == theirs.of[i].scale);
  }
  return same;
}

// Tiles of `rows` rows of `bytes` bytes, configured and multiplied.
const char* use_tiles(int rows, int bytes) {
  const char* const what = told([&] {
    const Config config = config_of(rows, bytes);
    amx::configure(&config);
    amx::multiply_add<0, 1, 2>();
  });
  amx::release();
  return what;
}
const char* use_after_release() {
  return told([] {
    {
      const Tiles tiles;
    }
    amx::zero<0>();
  });
}
const char* use_more_tiles() {
  return told([] {
    Config config = config_of(16, 64);
    config.rows[8] = 16, config.bytes[8] = 64;
    amx::configure(&config);
  });
}
// One product of whole tiles: words to words.
const char* multiply(const void* left, const void* right, void* sums, int one_chain) {
  amx::state.one_chain = one_chain;
  return told([&] {
    const Tiles tiles;
    amx::load<0>(sums, kLine), amx::load<1>(left, kLine), amx::load<2>(right, kLine);
    amx::multiply_add<0, 1, 2>();
    amx::store<0>(sums, kLine);
  });
}
// 20 rows in memory, a tile of 5 loaded: what the tile holds, as whole 16 rows.
void load_short(const void* from, void* to) {
  const Config config = config_of(5, 64);
  amx::configure(&config);
  amx::load<0>(from, kLine);
  std::memcpy(to, amx::state.tiles[0].data, sizeof(amx::state.tiles[0].data));
  amx::release();
}

}  // extern "C"
