// contour_expand and pixel_group on the CPU: level by level, the pixels at one distance from the sources claim their free
// neighbours. The smallest source wins a pixel, so the result is that of a queue, in whatever order a level is looked at.
// Each thread has rows of its own, and writes nothing else.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/detection/region_growing.h"
#include "bindings/support/parallel.h"

namespace torchkiln::bindings {
namespace {

using region_growing::Args;
using region_growing::MeanArgs;

// Pixels of one task; pixels that a level must have before threads share it, and rows that a thread must have.
constexpr std::int64_t kPiece = 16'384, kShared = 1'024, kRows = 8;
// Tables of sums that are added up in the end.
constexpr std::int64_t kMostTables = 16;

std::int64_t pieces_of(std::int64_t n, std::int64_t piece) { return (n + piece - 1) / piece; }

// f(piece, begin, end) for all pieces of [0, n), on torch's threads.
template <class F>
void for_pieces(std::int64_t n, std::int64_t piece, std::int64_t nanoseconds, const F& f) {
  parallel_for(pieces_of(n, piece), piece * nanoseconds, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      f(static_cast<std::size_t>(i), static_cast<i32>(i * piece),
        static_cast<i32>(std::min((i + 1) * piece, n)));
    }
  });
}

// A table of sums over all pixels, to which add(table, begin, end) adds some: several tables that are added up in order,
// whatever the number of threads.
template <class T, class Add>
std::vector<T> summed(std::int64_t pixels, std::size_t size, const Add& add) {
  const auto worthwhile = std::max(kPiece, 4 * static_cast<std::int64_t>(size));
  const std::int64_t tables = std::clamp<std::int64_t>(pixels / worthwhile, 1, kMostTables);
  std::vector<T> sums(size * static_cast<std::size_t>(tables));
  for_pieces(
      pixels, pieces_of(std::max<std::int64_t>(pixels, 1), tables), 1,
      [&](std::size_t table, i32 begin, i32 end) { add(sums.data() + table * size, begin, end); });
  for (std::size_t i = size; i < sums.size(); ++i) sums[i % size] += sums[i];
  sums.resize(size);
  return sums;
}

// ---- the map of an image ----

// Labels, and where they may spread to. A label of 0 is an open pixel; a claim is less than that.
class Map {
 public:
  // Gives the pixels their first labels.
  explicit Map(const Args& args)
      : labels_(args.labels), height_(args.height), width_(args.width), plane_(args.planes) {
    for_pieces(pixels(), kPiece, 1, [&](std::size_t, i32 begin, i32 end) {
      for (i32 i = begin; i < end; ++i) labels_[i] = region_growing::kept(args, i);
    });
  }

  void allow(const u8* plane) { plane_ = plane; }

  i32 height() const { return height_; }
  i32 width() const { return width_; }
  i32 pixels() const { return height_ * width_; }
  i32& label(i32 pixel) const { return labels_[pixel]; }
  bool allows(i32 pixel) const { return plane_[pixel] != 0; }

  bool has_open_neighbour(i32 pixel) const {
    const auto& others = region_growing::neighbours(pixel, height_, width_).at;
    return std::ranges::any_of(others, [&](i32 other) { return labels_[other] == 0; });
  }

 private:
  i32* labels_;
  i32 height_, width_;
  const u8* plane_;
};

// ---- growth ----

// A pixel, and the source that it was reached from.
struct Reached {
  i32 pixel, source;
};

// Rows of the image, [begin, end), that one thread at a time grows into.
struct alignas(128) Strip {
  struct Level {
    std::vector<Reached> all, first, last;  // first, last: those of all in the first, the last row

    void clear() {
      for (auto* list : {&all, &first, &last}) list->clear();
    }
    void add(const Strip& strip, i32 width, const Reached& reached) {
      all.push_back(reached);
      if (reached.pixel < strip.begin + width) first.push_back(reached);
      if (reached.pixel >= strip.end - width) last.push_back(reached);
    }
  };

  i32 begin, end;
  std::vector<i32> claimed;  // in this level
  Level level, next;
  std::vector<i32> open;  // has neighbours that a later round may reach
};

template <class IsNear>
class Growth {
 public:
  Growth(const Map& map, const IsNear& is_near) : map_(map), is_near_(is_near) {
    const std::int64_t most = std::max<std::int64_t>(1, map.height() / kRows);
    const auto count = std::clamp<std::int64_t>(torch::stable::get_num_threads(), 1, most);
    strips_.resize(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) {
      Strip& strip = strips_[static_cast<std::size_t>(i)];
      strip.begin = static_cast<i32>(map.height() * i / count) * map.width();
      strip.end = static_cast<i32>(map.height() * (i + 1) / count) * map.width();
    }
  }

  // The pixels for which has(pixel) holds are the sources of the first round.
  template <class Has>
  void start(const Has& has) {
    for_strips(map_.pixels(), [&](std::size_t i) {
      Strip& strip = strips_[i];
      for (i32 pixel = strip.begin; pixel < strip.end; ++pixel) {
        if (has(pixel)) strip.level.add(strip, map_.width(), {pixel, pixel});
      }
    });
  }

  // One round; what has open neighbours then is its successor's sources.
  void run() {
    for (std::int64_t size = size_of_level(); size > 0; size = size_of_level()) {
      for_strips(size, [&](std::size_t i) { grow(i); });
      for (Strip& strip : strips_) {
        std::swap(strip.level, strip.next);
        strip.next.clear();
      }
    }
    for (Strip& strip : strips_) {
      for (const i32 pixel : strip.open) strip.level.add(strip, map_.width(), {pixel, pixel});
      strip.open.clear();
    }
  }

 private:
  // f(i) for all strips, which have `pixels` to look at.
  template <class F>
  void for_strips(std::int64_t pixels, const F& f) {
    const auto all = static_cast<std::int64_t>(strips_.size());
    parallel_for(all, pixels < kShared ? 1 : kGrainNanoseconds,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i) f(static_cast<std::size_t>(i));
                 });
  }

  std::int64_t size_of_level() const {
    std::size_t size = 0;
    for (const Strip& strip : strips_) size += strip.level.all.size();
    return static_cast<std::int64_t>(size);
  }

  // Claims what this level reaches in a strip, then labels it.
  void grow(std::size_t i) {
    Strip& strip = strips_[i];
    const i32 width = map_.width();
    if (i > 0) {
      for (const Reached& from : strips_[i - 1].level.last) claim(strip, from, from.pixel + width);
    }
    if (i + 1 < strips_.size()) {
      for (const Reached& from : strips_[i + 1].level.first) claim(strip, from, from.pixel - width);
    }
    for (const Reached& from : strip.level.all) {
      if (claim_neighbours(strip, from)) strip.open.push_back(from.pixel);
    }
    for (const i32 pixel : strip.claimed) {
      const i32 source = map_.label(pixel) - kNoSource;
      map_.label(pixel) = map_.label(source);
      strip.next.add(strip, width, {pixel, source});
    }
    strip.claimed.clear();
  }

  // Whether some of the neighbours may stay open.
  bool claim_neighbours(Strip& strip, const Reached& from) {
    bool open = false;
    for (const i32 other : region_growing::neighbours(from.pixel, map_.height(), map_.width()).at) {
      const bool is_own = other >= strip.begin && other < strip.end;
      open |= is_own ? claim(strip, from, other) : !map_.allows(other);
    }
    return open;
  }

  // Whether an open pixel stays so in this round.
  bool claim(Strip& strip, const Reached& from, i32 pixel) {
    i32& label = map_.label(pixel);
    const i32 claim = kNoSource + from.source;
    if (label > 0 || label <= claim) return false;
    if (!map_.allows(pixel)) return true;
    if (!is_near_(map_.label(from.source), pixel)) return false;
    if (label == 0) strip.claimed.push_back(pixel);
    label = claim;
    return false;
  }

  // A claim stands in place of a label.
  static constexpr i32 kNoSource = std::numeric_limits<i32>::min();

  const Map& map_;
  const IsNear& is_near_;
  std::vector<Strip> strips_;
};

Tensor expand_cpu(const Tensor& masks, const Tensor& labels, std::int64_t min_area,
                  std::int64_t num_labels) {
  GrowthPlan p = plan_expand(masks, labels, min_area, num_labels);
  Args& args = p.args;
  const auto areas = summed<i32>(p.pixels(), static_cast<std::size_t>(num_labels) + 1,
                                 [&](i32* table, i32 begin, i32 end) {
                                   for (i32 i = begin; i < end; ++i) {
                                     if (args.kernels[i] > 0) ++table[args.kernels[i]];
                                   }
                                 });
  args.areas = areas.data();
  Map map(args);
  const auto anywhere = [](i32, i32) { return true; };
  Growth growth(map, anywhere);
  growth.start([&](i32 i) { return args.labels[i] != 0 && map.has_open_neighbour(i); });
  for (i64 round = args.rounds - 1; round >= 0; --round) {
    map.allow(args.planes + round * p.pixels());
    growth.run();
  }
  return p.labels;
}

// Rows of sums, and of the number of pixels behind them.
template <class Scalar>
std::vector<double> sums_of(const MeanArgs& args, std::size_t labels) {
  const auto channels = static_cast<std::size_t>(args.channels), row = channels + 1;
  return summed<double>(args.pixels, labels * row, [&](double* table, i32 begin, i32 end) {
    for (i32 i = begin; i < end; ++i) {
      if (args.labels[i] <= 0) continue;
      const auto* value =
          static_cast<const Scalar*>(args.values) + static_cast<std::size_t>(i) * channels;
      double* sums = table + static_cast<std::size_t>(args.labels[i]) * row;
      for (std::size_t c = 0; c < channels; ++c) sums[c] += static_cast<double>(load(value[c]));
      sums[channels] += 1;
    }
  });
}

template <class Scalar, class Out>
void means_cpu(const MeanArgs& args, std::int64_t num_labels) {
  const auto channels = static_cast<std::size_t>(args.channels);
  const auto labels = static_cast<std::size_t>(num_labels) + 1;
  const std::vector<double> sums = sums_of<Scalar>(args, labels);
  for (std::size_t label = 0; label < labels; ++label) {
    const double* row = sums.data() + label * (channels + 1);
    const double count = row[channels];
    for (std::size_t c = 0; c < channels; ++c) {
      const double mean = count > 0 ? row[c] / count : 0.0;
      store(static_cast<Out*>(args.means)[label * channels + c], static_cast<Acc<Out>>(mean));
    }
    if (args.counts != nullptr) args.counts[label] = static_cast<i64>(count);
  }
}

std::tuple<Tensor, Tensor, Tensor> group_cpu(const Tensor& scores, const Tensor& mask,
                                             const Tensor& embeddings, const Tensor& labels,
                                             const Tensor& contour, std::int64_t num_labels,
                                             double threshold) {
  const GrowthPlan p = plan_group(scores, mask, embeddings, labels, contour, num_labels, threshold);
  const Args& args = p.args;
  const Map map(args);
  with_float(scores.scalar_type(), [&]<class Scalar>() {
    means_cpu<Scalar, double>(mean_args(p, p.kernels, *p.embeddings, *p.means, {}, args.channels),
                              num_labels);
    const auto is_near = [&](i32 label, i32 pixel) {
      return region_growing::is_near<Scalar>(args, label, pixel);
    };
    Growth growth(map, is_near);
    growth.start([&](i32 i) { return args.labels[i] != 0 && args.contour[i] != 0; });
    growth.run();
    means_cpu<Scalar, Scalar>(mean_args(p, p.labels, *p.scores, *p.confidence, p.counts, 1),
                              num_labels);
  });
  return {p.labels, *p.confidence, *p.counts};
}

}  // namespace

std::int32_t largest_label(const Tensor& labels) {
  const auto* values = data<i32>(labels);
  std::vector<i32> largest(static_cast<std::size_t>(pieces_of(labels.numel(), kPiece)));
  for_pieces(labels.numel(), kPiece, 1, [&](std::size_t piece, i32 begin, i32 end) {
    i32 most = 0;
    for (i32 i = begin; i < end; ++i) most = std::max(most, values[i]);
    largest[piece] = most;
  });
  return largest.empty() ? 0 : *std::ranges::max_element(largest);
}

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("contour_expand", TORCH_BOX(&expand_cpu));
  m.impl("pixel_group", TORCH_BOX(&group_cpu));
}

}  // namespace torchkiln::bindings
