// Keys and values that will be needed soon are asked for while there is arithmetic to do. The two run side by side: two
// streams draw more from memory than one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace sphinx::attention {

// Memory with as many keys as values.
struct Region {
  const void *key, *value;
  int64_t bytes;  // of each
};

namespace {

class Ahead {
 public:
  // `next`, then `later`, in about `asks` portions.
  Ahead(const Region& next, const Region* later, int64_t later_count, int64_t asks) : later_(later) {
    int64_t bytes = next.bytes;
    for (int64_t i = 0; i < later_count; ++i) bytes += later[i].bytes;
    each_ = (bytes + kLine * asks - 1) / (kLine * std::max<int64_t>(asks, 1));
    later_end_ = later + later_count;
    begin(next);
  }

  void ask() {
    for (int64_t line = 0; line < each_; ++line) {
      __builtin_prefetch(key_, 0, 2);  // to the second-level cache: a tile of both is more than the first holds
      __builtin_prefetch(value_, 0, 2);
      key_ += kLine, value_ += kLine;
      if (key_ >= end_ && later_ != later_end_) begin(*later_++);
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  void begin(const Region& region) {
    key_ = static_cast<const char*>(region.key);
    value_ = static_cast<const char*>(region.value);
    end_ = key_ + region.bytes;
  }

  const char *key_, *value_, *end_;
  const Region *later_, *later_end_;
  int64_t each_;
};

}  // namespace
}  // namespace sphinx::attention
