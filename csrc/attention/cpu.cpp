// The room attention on the CPU. A group of rows walks the prefix it shares, in splits, over threads. Who ends a head's
// last split goes on for each of the rows: appends the new key and value, walks the suffix, adds up all splits.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "attention/math.h"
#include "attention/rows.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace sphinx::attention {
namespace {

constexpr int64_t kSplit = 512;  // positions one thread walks before another may take over
constexpr int64_t kAhead = 64;   // positions that are fetched before they are walked
// Of suffixes, fetched during the last split of a prefix: no more, the second-level cache has other guests.
constexpr int64_t kSoonBytes = 256 << 10;

// Memory that a thread keeps from call to call: fresh pages would cost as much as a short prefix.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (count > size_) {
      memory_.reset();
      size_ = ceil_div(count, 16) * 16;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float))));
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

struct Group {  // rows that read a prefix together
  int64_t first, rows, prefix, splits;
  int64_t unit;   // of all groups' units, the first; one for each split and head of keys, or for each head without any
  int64_t sums;   // of all sums of splits, the first
  int64_t heads;  // of all heads of keys of all groups, the first
};

class Step {
 public:
  Step(const Args& args, const RowsOf& loops, Scratch& scratch)
      : args_(args), loops_(loops), size_(item_size(args.dtype)), per_row_(args.heads / args.kv_heads) {
    most_ = std::max<int64_t>(1, kMostQueries / per_row_);
    int64_t sums = 0;
    for (int64_t r = 0; r < args.rows; r += groups_.back().rows) {
      const int64_t prefix = row_of(args, r).prefix, splits = ceil_div(prefix, kSplit);
      groups_.push_back({r, group_of(args, r, most_), prefix, splits, units_, sums,
                         static_cast<int64_t>(groups_.size()) * args.kv_heads});
      units_ += std::max<int64_t>(splits, 1) * args.kv_heads;
      sums += splits * groups_.back().rows * args.heads;
    }
    sums_ = scratch.floats(sums * (args.head_dim + 2));
    softmax_ = reinterpret_cast<Softmax*>(sums_ + sums * args.head_dim);
    arrived_ = std::vector<std::atomic<int64_t>>(groups_.size() * args.kv_heads);
  }

  void run(int threads) {
    threads_ = threads;
    parallel_for(units_, 1, threads, [&](int64_t begin, int64_t end) {
      thread_local Scratch scratch;
      Space space(scratch, most_ * per_row_, per_row_, args_.head_dim);
      for (int64_t unit = begin; unit < end; ++unit) run_unit(unit, space);
    });
  }

 private:
  // What a thread works in.
  struct Space {
    Space(Scratch& scratch, int64_t queries, int64_t per_row, int64_t head_dim)
        : query(scratch.floats((queries + 2 * per_row) * head_dim + 4 * per_row + 6 * queries)),
          all(query + queries * head_dim),
          part(all + per_row * head_dim),
          softmax(reinterpret_cast<Softmax*>(part + per_row * head_dim)),
          part_softmax(softmax + per_row),
          soon(reinterpret_cast<Region*>(part_softmax + per_row)) {}
    float *query, *all, *part;  // [.., head_dim]
    Softmax *softmax, *part_softmax;
    Region* soon;  // [rows of a group]
  };

  struct Unit {
    const Group& group;
    int64_t kv_head, split;
  };
  Unit unit_at(int64_t index) const {
    const auto after = std::upper_bound(groups_.begin(), groups_.end(), index,
                                        [](int64_t one, const Group& group) { return one < group.unit; });
    const Group& group = *(after - 1);
    const int64_t splits = std::max<int64_t>(group.splits, 1), own = index - group.unit;
    return {group, own / splits, own % splits};
  }

  // A split of a prefix; who brings a head's last one goes on with the suffixes.
  void run_unit(int64_t index, const Space& space) {
    const Unit unit = unit_at(index);
    if (unit.group.splits) walk_prefix(unit, index, space);
    if (arrived_[unit.group.heads + unit.kv_head]++ < unit.group.splits - 1) return;
    for (int64_t r = unit.group.first; r < unit.group.first + unit.group.rows; ++r) {
      finish(unit.group, r, unit.kv_head, space);
    }
  }

  template <class Byte>
  Byte* at(Byte* base, int64_t elements) const {
    return base + elements * size_;
  }
  char* head(const Heads& of, int64_t row, int64_t head) const {
    return at(static_cast<char*>(of.data), row * of.row_step + head * of.head_step);
  }

  Keys keys(const Cache& cache, int64_t slot, int64_t kv_head, int64_t first, int64_t count) const {
    const int64_t key = slot * cache.key_slot + kv_head * cache.key_head + first * cache.key_row;
    const int64_t value = slot * cache.value_slot + kv_head * cache.value_head + first * cache.value_row;
    Keys keys{};
    keys.key = at(static_cast<char*>(cache.key), key);
    keys.value = at(static_cast<char*>(cache.value), value);
    keys.key_row = cache.key_row;
    keys.value_row = cache.value_row;
    keys.count = count;
    keys.per_row = per_row_;
    keys.factor = args_.scale * kLog2e;
    return keys;
  }
  Keys prefix_of(const Unit& unit) const {
    const int64_t first = unit.split * kSplit;
    return keys(args_.prefix, row_of(args_, unit.group.first).picture, unit.kv_head, first,
                std::min(kSplit, unit.group.prefix - first));
  }

  Keys suffix_of(int64_t r, int64_t kv_head) const {
    const Row row = row_of(args_, r);
    return keys(args_.suffix, row.question, kv_head, 0, std::min(kSplit, row.suffix));
  }
  // Of keys that lie together; others are not fetched ahead.
  Region region_of(const Keys& of) const {
    const bool together = of.key_row == args_.head_dim && of.value_row == args_.head_dim;
    return {of.key, of.value, together ? std::min(of.count, kAhead) * args_.head_dim * size_ : 0};
  }

  // The queries of `rows` rows for one head of keys, [rows * per_row, head_dim].
  void rotate_queries(int64_t first, int64_t rows, int64_t kv_head, float* to) const {
    for (int64_t r = first; r < first + rows; ++r) {
      const int64_t position = row_of(args_, r).position;
      for (int64_t i = 0; i < per_row_; ++i, to += args_.head_dim) {
        loops_.rotate_query(head(args_.query, r, kv_head * per_row_ + i), args_.head_dim, args_.rope, position,
                            args_.scale * kLog2e, to);
      }
    }
  }

  // Of all sums, the first of a split's: rows by rows, per_row for each.
  int64_t sums_of(const Group& group, int64_t kv_head, int64_t split) const {
    return group.sums + (kv_head * group.splits + split) * group.rows * per_row_;
  }

  void walk_prefix(const Unit& unit, int64_t index, const Space& space) const {
    const Group& group = unit.group;
    rotate_queries(group.first, group.rows, unit.kv_head, space.query);
    Keys of = prefix_of(unit);
    if (args_.mask) {
      of.mask = args_.mask + group.first * args_.mask_step + unit.split * kSplit;
      of.mask_step = args_.mask_step;
    }
    if (index + threads_ < units_) {  // where this thread will be when all are equally fast
      const Unit next = unit_at(index + threads_);
      if (next.group.splits) of.next = region_of(prefix_of(next));
    }
    if (unit.split == group.splits - 1) {
      of.soon = space.soon;
      int64_t bytes = 0;
      for (; of.soon_count < group.rows && args_.suffix.slots && bytes < kSoonBytes; ++of.soon_count) {
        space.soon[of.soon_count] = region_of(suffix_of(group.first + of.soon_count, unit.kv_head));
        bytes += 2 * space.soon[of.soon_count].bytes;
      }
    }
    const int64_t sums = sums_of(group, unit.kv_head, unit.split);
    loops_.attend(space.query, group.rows * per_row_, args_.head_dim, of, softmax_ + sums,
                  sums_ + sums * args_.head_dim);
  }

  // A row's results for the heads that share keys: splits of its prefix, then of its suffix, added in this order.
  void finish(const Group& group, int64_t r, int64_t kv_head, const Space& space) const {
    const int64_t head_dim = args_.head_dim;
    float* const all = space.all;
    Softmax* const softmax = space.softmax;
    std::fill_n(all, per_row_ * head_dim, 0.0f);
    std::fill_n(softmax, per_row_, Softmax{-INFINITY, 0});
    const auto add = [&](const Softmax* own, const float* sums) {
      for (int64_t i = 0; i < per_row_; ++i) {
        const Weights weights = merge(softmax[i], own[i]);
        loops_.fold(all + i * head_dim, sums + i * head_dim, weights, head_dim);
      }
    };
    const Row row = row_of(args_, r);
    if (args_.key.data) append(row, r, kv_head);
    for (int64_t split = 0; split < group.splits; ++split) {
      const int64_t sums = sums_of(group, kv_head, split) + (r - group.first) * per_row_;
      add(softmax_ + sums, sums_ + sums * head_dim);
    }
    if (row.suffix) rotate_queries(r, 1, kv_head, space.query);
    for (int64_t first = 0; first < row.suffix; first += kSplit) {
      Keys of = keys(args_.suffix, row.question, kv_head, first, std::min(kSplit, row.suffix - first));
      if (r + 1 < group.first + group.rows) of.next = region_of(suffix_of(r + 1, kv_head));
      loops_.attend(space.query, per_row_, head_dim, of, space.part_softmax, space.part);
      add(space.part_softmax, space.part);
    }
    for (int64_t i = 0; i < per_row_; ++i) {
      const int64_t h = kv_head * per_row_ + i;
      const float inverse = softmax[i].sum == 0 ? 0 : 1 / softmax[i].sum;
      loops_.scale(all + i * head_dim, inverse, head_dim, head(args_.out, r, h));
      if (args_.lse) args_.lse[r * args_.heads + h] = log_sum_exp(softmax[i]);
    }
  }

  void append(const Row& row, int64_t r, int64_t kv_head) const {
    const Keys to = keys(args_.suffix, row.question, kv_head, row.suffix - 1, 1);
    loops_.rotate(head(args_.key, r, kv_head), args_.head_dim, args_.rope, row.position, const_cast<void*>(to.key));
    std::memcpy(const_cast<void*>(to.value), head(args_.value, r, kv_head), args_.head_dim * size_);
  }

  const Args& args_;
  const RowsOf& loops_;
  const int64_t size_, per_row_;
  int64_t most_;  // rows of a group
  int threads_ = 1;
  std::vector<Group> groups_;
  int64_t units_ = 0;
  float* sums_;
  Softmax* softmax_;
  std::vector<std::atomic<int64_t>> arrived_;  // splits, for each head of keys of each group
};

const RowsOf& loops_of(Isa isa, DType dtype) {
  return loops_for(isa, kRows).of[float_index(dtype)];
}

}  // namespace

void run_cpu(const Args& args, Isa isa, int threads) {
  thread_local Scratch scratch;
  Step(args, loops_of(isa, args.dtype), scratch).run(threads);
}

}  // namespace sphinx::attention
