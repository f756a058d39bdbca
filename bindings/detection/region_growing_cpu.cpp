// contour_expand and pixel_group on the CPU. A queue, level by level: the pixels at one distance from the sources, in the
// order of the queue, label their free neighbours. Levels that are long enough are shared by threads: the pixel that is
// first in the queue claims a neighbour, so the result is that of the plain queue.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <tuple>
#include <vector>

#include "bindings/detection/region_growing.h"
#include "bindings/support/parallel.h"

namespace torchkiln::bindings {
namespace {

using region_growing::Args;
using region_growing::MeanArgs;
using Pixels = std::vector<i32>;

// Pixels of one task; pixels that a level must have before threads share it, and those of one task then.
constexpr std::int64_t kPiece = 16'384, kShared = 2'048, kSharedPiece = 256;
constexpr std::int64_t kGrowNanoseconds = 30;
// Pixels of one task that looks at their neighbours, and what that takes for each.
constexpr std::int64_t kOpenPiece = 2'048, kOpenNanoseconds = 10;
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

// Adds pieces to a queue, in their order.
void append(Pixels& queue, const std::vector<Pixels>& pieces) {
  std::size_t size = queue.size();
  for (const Pixels& piece : pieces) size += piece.size();
  queue.reserve(size);
  for (const Pixels& piece : pieces) queue.insert(queue.end(), piece.begin(), piece.end());
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

  i32 pixels() const { return height_ * width_; }
  i32& label(i32 pixel) const { return labels_[pixel]; }
  bool allows(i32 pixel) const { return plane_[pixel] != 0; }
  bool is_free(i32 pixel) const { return labels_[pixel] == 0 && allows(pixel); }

  template <class F>
  void for_neighbours(i32 pixel, const F& f) const {
    for (const i32 other : region_growing::neighbours(pixel, height_, width_).at) f(other);
  }

  bool has_open_neighbour(i32 pixel) const {
    bool open = false;
    for_neighbours(pixel, [&](i32 other) { open = open || labels_[other] == 0; });
    return open;
  }

 private:
  i32* labels_;
  i32 height_, width_;
  const u8* plane_;
};

// The pixels for which has(pixel) holds, in row-major order.
template <class Has>
Pixels pixels_with(i32 n, const Has& has) {
  std::vector<Pixels> found(static_cast<std::size_t>(pieces_of(n, kPiece)));
  for_pieces(n, kPiece, 1, [&](std::size_t piece, i32 begin, i32 end) {
    for (i32 i = begin; i < end; ++i) {
      if (has(i)) found[piece].push_back(i);
    }
  });
  Pixels queue;
  append(queue, found);
  return queue;
}

// Only pixels with an open neighbour have something to do in the next round; they start in row-major order.
void begin_round(const Map& map, Pixels& queue) {
  std::vector<std::uint64_t> chosen(static_cast<std::size_t>(pieces_of(map.pixels(), 64)));
  const auto n = static_cast<std::int64_t>(queue.size());
  for_pieces(n, kOpenPiece, kOpenNanoseconds, [&](std::size_t, i32 begin, i32 end) {
    for (i32 i = begin; i < end; ++i) {
      const i32 pixel = queue[static_cast<std::size_t>(i)];
      if (!map.has_open_neighbour(pixel)) continue;
      const auto word = static_cast<std::size_t>(pixel) / 64;
      std::atomic_ref(chosen[word])
          .fetch_or(std::uint64_t{1} << (pixel % 64), std::memory_order_relaxed);
    }
  });
  queue.clear();
  for (std::size_t word = 0; word < chosen.size(); ++word) {
    for (std::uint64_t rest = chosen[word]; rest != 0; rest &= rest - 1) {
      queue.push_back(static_cast<i32>(word) * 64 + std::countr_zero(rest));
    }
  }
}

// ---- growth ----

template <class IsNear>
class Growth {
 public:
  Growth(const Map& map, const IsNear& is_near) : map_(map), is_near_(is_near) {}

  // Adds what the sources in the queue reach to it.
  void run(Pixels& queue) {
    const bool has_threads = torch::stable::get_num_threads() > 1;
    for (std::size_t begin = 0, end = queue.size(); begin < end; begin = end, end = queue.size()) {
      const auto n = static_cast<std::int64_t>(end - begin);
      if (has_threads && n >= kShared) {
        grow_shared(queue, begin, n);
      } else {
        for (std::size_t i = begin; i < end; ++i) grow_from(queue, queue[i]);
      }
    }
  }

 private:
  void grow_from(Pixels& queue, i32 pixel) {
    const i32 label = map_.label(pixel);
    map_.for_neighbours(pixel, [&](i32 other) {
      if (!map_.is_free(other) || !is_near_(label, other)) return;
      map_.label(other) = label;
      queue.push_back(other);
    });
  }

  // First every pixel claims its neighbours by its place in the level, then it takes those that it got. Until then the
  // claim stands in place of a label; the smallest one wins.
  void grow_shared(Pixels& queue, std::size_t level, std::int64_t n) {
    std::vector<Pixels> taken(static_cast<std::size_t>(pieces_of(n, kSharedPiece)));
    const auto for_claims = [&](const auto& f) {
      for_pieces(n, kSharedPiece, kGrowNanoseconds, [&](std::size_t piece, i32 begin, i32 end) {
        taken[piece].reserve(static_cast<std::size_t>(end - begin));
        for (i32 place = begin; place < end; ++place) {
          const i32 pixel = queue[level + static_cast<std::size_t>(place)];
          const i32 claim = std::numeric_limits<i32>::min() + place, label = map_.label(pixel);
          map_.for_neighbours(pixel, [&](i32 other) {
            f(taken[piece], label, claim, other, std::atomic_ref(map_.label(other)));
          });
        }
      });
    };
    for_claims([&](Pixels&, i32 label, i32 claim, i32 other, std::atomic_ref<i32> value) {
      i32 seen = value.load(std::memory_order_relaxed);
      if (seen <= claim || seen > 0 || !map_.allows(other) || !is_near_(label, other)) return;
      while (claim < seen && !value.compare_exchange_weak(seen, claim, std::memory_order_relaxed)) {
      }
    });
    for_claims([&](Pixels& own, i32 label, i32 claim, i32 other, std::atomic_ref<i32> value) {
      if (value.load(std::memory_order_relaxed) != claim) return;
      value.store(label, std::memory_order_relaxed);
      own.push_back(other);
    });
    append(queue, taken);
  }

  const Map& map_;
  const IsNear& is_near_;
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
  Pixels queue = pixels_with(
      map.pixels(), [&](i32 i) { return args.labels[i] != 0 && map.has_open_neighbour(i); });
  const auto anywhere = [](i32, i32) { return true; };
  Growth growth(map, anywhere);
  for (i64 round = args.rounds - 1; round >= 0; --round) {
    map.allow(args.planes + round * p.pixels());
    begin_round(map, queue);
    growth.run(queue);
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
  Map map(args);
  Pixels queue =
      pixels_with(map.pixels(), [&](i32 i) { return args.labels[i] != 0 && args.contour[i] != 0; });
  with_float(scores.scalar_type(), [&]<class Scalar>() {
    means_cpu<Scalar, double>(mean_args(p, p.kernels, *p.embeddings, *p.means, {}, args.channels),
                              num_labels);
    const auto is_near = [&](i32 label, i32 pixel) {
      return region_growing::is_near<Scalar>(args, label, pixel);
    };
    Growth(map, is_near).run(queue);
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
