// Canvas -> views on the CPU: the crops, row by row as the canvas is made, then what is resampled from all of it.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "views/resize.h"

namespace sphinx::views {

inline Nearest view_of(const std::vector<int32_t>& index, const std::vector<uint8_t>& masks) {
  return {static_cast<int>(index.size()), index.data(), masks.empty() ? nullptr : masks.data()};
}

// Masks for Nearest, or nothing where 16 neighbours do not come from 16 bytes.
inline std::vector<uint8_t> masks_of(const std::vector<int32_t>& index) {
  std::vector<uint8_t> masks(index.size());
  for (size_t x = 0; x < index.size(); ++x) {
    const int32_t offset = index[x] - index[x / 16 * 16];
    if (offset > 15) return {};
    masks[x] = static_cast<uint8_t>(offset);
  }
  return masks;
}

// F.interpolate(x.half(), count, mode="bicubic") of the normalised canvas, a row at a time. Tables for all pictures.
class Resampling {
 public:
  Resampling(int extent, int count) : extent_(extent), count_(count), ratio_(extent % count ? 0 : extent / count) {
    for (int i = 0; i < count; ++i) {
      taps_.push_back(four_taps_of(i, extent, count));
      for (int k = 0; k < 4; ++k) {
        index_[k].push_back(taps_[i].index[k]);
        weight_[k].push_back(taps_[i].weight[k]);
      }
      middle_.push_back(taps_[i].index[1]);
    }
  }

  int extent() const { return extent_; }
  int count() const { return count_; }
  bool only_picks() const { return ratio_ % 2 == 1; }  // an odd whole ratio: the weights are [0, 1, 0, 0]
  const FourTaps& taps(int i) const { return taps_[i]; }
  Nearest middle() const { return {count_, middle_.data(), nullptr}; }
  FourTapsRow row() const {
    FourTapsRow row{count_, {}, {}};
    for (int k = 0; k < 4; ++k) {
      row.index[k] = index_[k].data();
      row.weight[k] = weight_[k].data();
    }
    return row;
  }

 private:
  int extent_, count_, ratio_;
  std::vector<FourTaps> taps_;
  std::vector<int32_t> index_[4], middle_;
  std::vector<float> weight_[4];
};

// One thread's rows of a resampling: keeps the last lines it filtered, since neighbouring rows share them.
class Resampler {
 public:
  Resampler(const Resampling& table, const PlanarRows& canvas, const Rows& loops, const Emit& emit)
      : table_(table),
        canvas_(canvas),
        loops_(loops),
        emit_(emit),
        scratch_(table.extent() + kSlack),
        picked_(table.count() + kSlack) {}

  // Row y of channel c, `table.count()` values of the outputs' dtype.
  void row(int c, int y, void* result) {
    const FourTaps& taps = table_.taps(y);
    if (table_.only_picks()) {
      loops_.pick(canvas_.channel(taps.index[1], c), table_.middle(), picked_.data());
      emit_.through_half(picked_.data(), c, table_.count(), result);
      return;
    }
    const float* lines[4];
    for (int k = 0; k < 4; ++k) lines[k] = line(c, taps.index[k]);
    emit_.filter_column(lines, taps.weight, table_.count(), result);
  }

 private:
  const float* line(int c, int y) {  // four neighbours fall into four slots
    const int64_t key = static_cast<int64_t>(c) * table_.extent() + y;
    std::vector<float>& slot = lines_[y % 4];
    if (keys_[y % 4] != key) {
      keys_[y % 4] = key;
      slot.resize(table_.count() + kSlack);
      loops_.filter_row(canvas_.channel(y, c), c, table_.extent(), table_.row(), scratch_.data(), slot.data());
    }
    return slot.data();
  }

  const Resampling& table_;
  const PlanarRows& canvas_;
  const Rows& loops_;
  const Emit& emit_;
  std::vector<float> scratch_, lines_[4];
  std::vector<uint8_t> picked_;
  int64_t keys_[4] = {-1, -1, -1, -1};
};

// What is the same for all pictures of a call: sizes and the tables that follow from them.
class Cut {
 public:
  Cut(const Outputs& sizes, const Rows& loops)
      : loops_(loops),
        emit_(loops.emit[float_index(sizes.dtype)]),
        item_(item_size(sizes.dtype)),
        size_(sizes.picture_size),
        side_(sizes.view_size),
        ratio_(size_ / side_),
        target_(sizes.convnext_size),
        dinov2_side_(sizes.dinov2_size),
        overview_(size_, side_) {
    for (int i = 0; sizes.convnext && i < target_; ++i) nearest_.push_back(nearest_index(i, side_, target_));
    masks_ = masks_of(nearest_);
    for (int y = 0; y <= side_; ++y) {
      copies_.push_back(static_cast<int>(std::lower_bound(nearest_.begin(), nearest_.end(), y) - nearest_.begin()));
    }
    if (sizes.dinov2 && dinov2_side_ != side_) {
      dinov2_.emplace_back(size_, dinov2_side_);
      if (ratio_ > 1) dinov2_.emplace_back(size_, dinov2_side_ * ratio_);
    }
  }

  // Canvas row y's part of the crops, or of the only view.
  void crop_rows(const PlanarRows& canvas, const Outputs& out, int y, std::vector<uint8_t>& picked) const {
    picked.resize(static_cast<size_t>(target_) + kSlack);
    const int line = y % side_;
    for (int crop = 0; crop < ratio_; ++crop) {
      const int view = ratio_ == 1 ? 0 : 1 + y / side_ * ratio_ + crop;
      for (int c = 0; c < 3; ++c) {
        const uint8_t* pixels = canvas.channel(y, c) + crop * side_;
        void* dinov2 = dinov2_.empty() ? row_of(out.dinov2, view, c, side_, line) : nullptr;
        void* clip = row_of(out.clip, view, c, side_, line);
        emit_.pixels(pixels, c, side_, clip, dinov2);
        for (int t = copies_[line]; t < copies_[line + 1]; ++t) {
          void* convnext = row_of(out.convnext, view, c, target_, t);
          if (target_ == side_ && ratio_ > 1) {
            emit_.pixels(pixels, c, side_, convnext, nullptr);  // the light variants' crops are not rounded
          } else if (item_ == 4) {
            emit_.pick(clip, side_, view_of(nearest_, masks_), convnext);
          } else {  // 16 bits have lost what fp16 still has
            loops_.pick(pixels, view_of(nearest_, masks_), picked.data());
            emit_.through_half(picked.data(), c, target_, convnext);
          }
        }
      }
    }
  }

  // What depends on more than one canvas row: the global view, and DINOv2's views where they have a size of their own.
  void resampled_views(const PlanarRows& canvas, const Outputs& out, Team& team) const {
    if (ratio_ > 1) {
      each_row(overview_, canvas, team, [&](int c, int y, const char* values) {
        void* clip = row_of(out.clip, 0, c, side_, y);
        std::memcpy(clip, values, static_cast<size_t>(side_ * item_));
        if (out.dinov2 && dinov2_.empty()) emit_.renormalise(clip, c, side_, row_of(out.dinov2, 0, c, side_, y));
        for (int t = copies_[y]; t < copies_[y + 1]; ++t) {
          emit_.pick(values, side_, view_of(nearest_, masks_), row_of(out.convnext, 0, c, target_, t));
        }
      });
    }
    for (const Resampling& table : dinov2_) {
      const int across = table.count() / dinov2_side_;
      const bool global = &table == &dinov2_.front();
      each_row(table, canvas, team, [&](int c, int y, const char* values) {
        for (int crop = 0; crop < across; ++crop) {
          const int view = global ? 0 : 1 + y / dinov2_side_ * ratio_ + crop;
          emit_.renormalise(values + crop * dinov2_side_ * item_, c, dinov2_side_,
                            row_of(out.dinov2, view, c, dinov2_side_, y % dinov2_side_));
        }
      });
    }
  }

  int size() const { return size_; }

 private:
  void* row_of(void* output, int view, int c, int side, int y) const {
    if (!output) return nullptr;
    return static_cast<char*>(output) + ((static_cast<int64_t>(view) * 3 + c) * side + y) * side * item_;
  }

  template <class Use>
  void each_row(const Resampling& table, const PlanarRows& canvas, Team& team, const Use& use) const {
    const int count = table.count();
    team.each(count * 3, rows_for(table.extent() * 32), [&](int64_t begin, int64_t end) {
      Resampler resampler(table, canvas, loops_, emit_);
      std::vector<char> values(static_cast<size_t>(count + kSlack) * item_);
      for (int64_t index = begin; index < end; ++index) {
        const int c = static_cast<int>(index / count), y = static_cast<int>(index % count);
        resampler.row(c, y, values.data());
        use(c, y, values.data());
      }
    });
  }

  const Rows& loops_;
  const Emit& emit_;
  int64_t item_;
  int size_, side_, ratio_, target_, dinov2_side_;
  Resampling overview_;
  std::vector<Resampling> dinov2_;  // empty where DINOv2 reads the views as they are; else the global one, the crops'
  std::vector<int32_t> nearest_;    // of ConvNeXt's pixels; empty where it is not wanted
  std::vector<uint8_t> masks_;
  std::vector<int> copies_;  // [y, y + 1): ConvNeXt's rows that come from row y of a view
};

}  // namespace sphinx::views
