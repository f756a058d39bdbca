// Pixels and weights of the samples of some bins, for the CPU loops.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "detection/sampled_roi.h"

namespace torchkiln::bindings::sampled {

using sampled_roi::Args;
using sampled_roi::Patch;

constexpr i32 kEntries = 2048;  // of a table: 64 KB

inline std::size_t place(std::int64_t at) { return static_cast<std::size_t>(at); }

// Bins [first, first + bins) of a group, and a chunk of their samples: sample s of bin b stands at s * bins + b.
template <class Op, class T>
class Table {
 public:
  Table(const Args& args, bool channels_last) : args_(args), channels_last_(channels_last) {}

  // `image`: -1 for any; a table for another image stays empty.
  void lay_out(std::int64_t group, std::int64_t first, std::int64_t bins, std::int64_t image) {
    patches_.clear();
    most_ = 0;
    first_ = first;
    for (std::int64_t bin = first; bin < first + bins; ++bin) {
      patches_.push_back(Op::template patch<T>(args_, group, bin));
      Patch<T>& p = patches_.back();
      sampled_roi::clip<Op>(p, args_);
      if (image >= 0 && p.image != image) {
        patches_.clear();
        return;
      }
      most_ = std::max(most_, p.count());
    }
  }

  void fill(i32 begin) {
    begin_ = begin;
    count_ = std::min(most_ - begin, chunk());
    const std::int64_t bins = this->bins(), n = bins * count_, map = args_.h * args_.w;
    pixels_.resize(place(4 * n));
    weights_.resize(place(4 * n));
    const i32 w = static_cast<i32>(args_.w);
    for (std::int64_t at = 0; at < n; ++at) {
      const std::int64_t bin = at % bins, own = first_ + bin;
      const Patch<T>& p = patches_[place(bin)];
      // channels first: blocks of channels that bins take turns at are further maps.
      const bool further = Op::kBordered && !channels_last_;
      const std::int64_t base = further ? own % sampled_roi::kBorders * args_.channels * map : 0;
      sampled_roi::Pixels pixels;
      sampled_roi::Weights<T> weights;
      sampled_roi::take(
          sampled_roi::point_of<Op>(p, begin + static_cast<i32>(at / bins)),
          static_cast<i32>(args_.h), w, p.share,
          [&](i32 y, i32 x) { return static_cast<i32>(base) + y * w + x; }, pixels, weights);
      for (int k = 0; k < 4; ++k) {
        pixels_[place(k * n + at)] = k > 0 ? std::max(pixels.at[k], 0) : pixels.at[k];
        weights_[place(k * n + at)] = weights.at[k];
      }
    }
  }

  i32 chunk() const { return std::max<i32>(1, kEntries / static_cast<i32>(bins())); }
  i32 most() const { return most_; }
  i32 begin() const { return begin_; }
  i32 count() const { return count_; }
  std::int64_t bins() const { return static_cast<std::int64_t>(patches_.size()); }
  std::int64_t first() const { return first_; }
  std::size_t entries() const { return pixels_.size() / 4; }
  const Patch<T>& patch(std::int64_t bin) const { return patches_[place(bin)]; }
  const i32* pixels() const { return pixels_.data(); }
  const T* weights() const { return weights_.data(); }

  // f(pixel, weight) for what a sample takes.
  template <class F>
  void of_sample(std::int64_t bin, std::int64_t sample, const F& f) const {
    const std::size_t at = place(sample * bins() + bin), n = entries();
    if (pixels_[at] < 0) return;
    for (std::size_t k = 0; k < 4; ++k) f(pixels_[k * n + at], weights_[k * n + at]);
  }

 private:
  const Args& args_;
  bool channels_last_;
  std::vector<Patch<T>> patches_;
  std::vector<i32> pixels_;
  std::vector<T> weights_;
  std::int64_t first_ = 0;
  i32 most_ = 0, begin_ = 0, count_ = 0;
};

}  // namespace torchkiln::bindings::sampled
