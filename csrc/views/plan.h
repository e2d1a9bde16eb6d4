// The tables of a resize on the CPU: computed once for an axis, kept for the next picture of the same extents.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "views/args.h"
#include "views/math.h"
#include "views/rows.h"

namespace sphinx::views {

enum class Pass : uint8_t { horizontal, vertical };

// Windows and weights of the canvas's `size` pixels along one axis. Padding is part of where a sum starts in the
// horizontal pass, and one more tap, behind the picture's, in the vertical pass.
class AxisPlan {
 public:
  AxisPlan(const Axis& axis, int size, Pass pass) : axis_(axis), size_(size), pass_(pass) {
    const Filter filter = make_filter(axis.in, axis.out);
    const int padded = static_cast<int>(round_up(size, kPlaneUnit));
    first_.resize(padded);
    count_.resize(padded);
    nothing_.resize(padded);
    padded_.resize(padded);
    start_.resize(static_cast<size_t>(padded) * 4, kRoundHalf);
    padding_.resize(static_cast<size_t>(padded) * 4, kRoundHalf);
    stride_ = static_cast<int>(round_up(std::min<int64_t>(filter.max_taps, axis.extent) + 2, 2)) * 2;
    weights_.resize(static_cast<size_t>(padded) * stride_);

    std::vector<int32_t> weights(filter.max_taps);
    for (int i = 0; i < size; ++i) {
      const int64_t output = axis.begin + i;
      const Window window = window_of(filter, output);
      const double sum = window_sum(filter, output, window);
      const Tap tap = split_window(window, axis.before, axis.extent, [&](int k) {
        return weights[k] = fixed_weight(window_weight(filter, output, window, k), sum);
      });
      // The horizontal loops read pixels in pairs: an odd first pixel has a tap of weight 0 before it.
      const int odd = pass == Pass::horizontal ? tap.first % 2 : 0;
      first_[i] = tap.first - odd;
      count_[i] = tap.count ? tap.count + odd : 0;
      for (int k = 0; k < tap.count; ++k) put(i, k + odd, weights[tap.skip + k]);
      if (pass == Pass::vertical) {
        padded_[i] = tap.pad != 0;
        if (padded_[i]) put(i, count_[i]++, tap.pad);
      } else {
        for (int c = 0; c < 3; ++c) {
          start_[i * 4 + c] += tap.pad * pad_colour(c);
          padding_[i * 4 + c] += tap.total * pad_colour(c);
        }
      }
      if (tap.count) {
        low_ = std::min(low_, tap.first);
        high_ = std::max(high_, tap.first + tap.count);
      }
    }
    low_ = std::min(low_, high_);
    spans_.resize(static_cast<size_t>(padded / kPlaneUnit) * 2);
    no_spans_.resize(spans_.size());
    for (int i = 0; i < size; ++i) {
      int32_t* span = spans_.data() + i / kPlaneUnit * 2;
      if (!count_[i]) continue;
      span[0] = span[1] ? std::min(span[0], first_[i]) : first_[i];
      span[1] = std::max(span[1], first_[i] + count_[i]);
      longest_ = std::max(longest_, span[1] - span[0]);
    }
  }

  bool is_for(const Axis& axis, int size, Pass pass) const {
    return size == size_ && pass == pass_ && axis.in == axis_.in && axis.before == axis_.before &&
           axis.extent == axis_.extent && axis.out == axis_.out && axis.begin == axis_.begin;
  }

  int64_t low() const { return low_; }  // the picture's pixels [low, high) are all that is read
  int64_t high() const { return high_; }

  // For the horizontal pass; and without any pixels: what a row of nothing but padding becomes.
  Taps taps() const {
    return {outputs(), stride_, longest_, spans_.data(), first_.data(), count_.data(), weights_.data(), start_.data()};
  }
  Taps padding() const {
    return {outputs(),       stride_,        0, no_spans_.data(), nothing_.data(), nothing_.data(),
            weights_.data(), padding_.data()};
  }

  // For the vertical pass.
  int first(int i) const { return first_[i]; }
  int count(int i) const { return count_[i]; }
  bool has_padding(int i) const { return padded_[i] != 0; }  // the last tap is padding
  const int16_t* weights(int i) const { return weights_.data() + static_cast<size_t>(i) * stride_; }

 private:
  int outputs() const { return static_cast<int>(first_.size()); }
  void put(int i, int tap, int32_t weight) {
    int16_t* pair = weights_.data() + static_cast<size_t>(i) * stride_ + tap / 2 * 4 + tap % 2;
    pair[0] = static_cast<int16_t>(weight >> 8);
    pair[2] = static_cast<int16_t>(weight & 255);
  }

  Axis axis_;
  int size_;
  Pass pass_;
  int stride_ = 0;
  int32_t low_ = INT32_MAX, high_ = 0, longest_ = 0;
  std::vector<int32_t> first_, count_, nothing_, start_, padding_, spans_, no_spans_;
  std::vector<int16_t> weights_;
  std::vector<uint8_t> padded_;
};

// The plan for an axis, from the last kKept ones this thread asked for. Per thread: no lock, nothing that a fork
// breaks.
inline std::shared_ptr<const AxisPlan> plan_of(const Axis& axis, int size, Pass pass) {
  constexpr size_t kKept = 16;
  static thread_local std::vector<std::shared_ptr<const AxisPlan>> kept;
  auto found = std::find_if(kept.begin(), kept.end(), [&](const auto& plan) { return plan->is_for(axis, size, pass); });
  if (found == kept.end()) {
    if (kept.size() == kKept) kept.erase(kept.begin());
    kept.push_back(std::make_shared<const AxisPlan>(axis, size, pass));
    found = kept.end() - 1;
  }
  std::rotate(found, found + 1, kept.end());  // the one used last stands last
  return kept.back();
}

}  // namespace sphinx::views
