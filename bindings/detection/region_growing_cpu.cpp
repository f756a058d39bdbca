// contour_expand and pixel_group on the CPU. A queue, level by level: the pixels at one distance from the sources, in the
// order of the queue, label their free neighbours. Levels that are long enough are shared by threads: the pixel that is
// first in the queue claims a neighbour, so the result is that of the plain queue.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <bit>
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

// What is known of a pixel: may this round grow into it, is it at a side of the image, does it have no label?
enum Bits : u8 { kFree = 1, kLeft = 2, kRight = 4, kOpen = 8 };

class Map {
 public:
  // Gives the pixels their first labels.
  explicit Map(const Args& args)
      : width_(args.width),
        pixels_(args.height * args.width),
        bits_(static_cast<std::size_t>(pixels_)) {
    for_pieces(pixels_, kPiece, 1, [&](std::size_t, i32 begin, i32 end) {
      for (i32 i = begin; i < end; ++i) {
        args.labels[i] = region_growing::kept(args, i);
        at(i) = args.labels[i] == 0 ? kOpen : 0;
      }
    });
    for (i32 i = 0; width_ > 0 && i < pixels_; i += width_) {
      at(i) |= kLeft;
      at(i + width_ - 1) |= kRight;
    }
  }

  void allow(const u8* plane) {
    for_pieces(pixels_, kPiece, 1, [&](std::size_t, i32 begin, i32 end) {
      for (i32 i = begin; i < end; ++i) {
        const u8 open = plane[i] != 0 ? at(i) & kOpen : 0;
        at(i) = static_cast<u8>((at(i) & ~kFree) | (open / kOpen));
      }
    });
  }

  bool is_free(i32 pixel) const { return (at(pixel) & kFree) != 0; }
  void close(i32 pixel) { at(pixel) &= static_cast<u8>(~(kFree | kOpen)); }

  template <class F>
  void for_neighbours(i32 pixel, const F& f) const {
    const u8 own = at(pixel);
    if (pixel >= width_) f(pixel - width_);
    if (pixels_ - pixel > width_) f(pixel + width_);
    if ((own & kLeft) == 0) f(pixel - 1);
    if ((own & kRight) == 0) f(pixel + 1);
  }

  bool has_open_neighbour(i32 pixel) const {
    u8 around = 0;
    for_neighbours(pixel, [&](i32 other) { around |= at(other); });
    return (around & kOpen) != 0;
  }

  i32 pixels() const { return pixels_; }

 private:
  u8& at(i32 pixel) { return bits_[static_cast<std::size_t>(pixel)]; }
  const u8& at(i32 pixel) const { return bits_[static_cast<std::size_t>(pixel)]; }

  i32 width_, pixels_;
  std::vector<u8> bits_;
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
  for_pieces(n, kPiece, 4, [&](std::size_t, i32 begin, i32 end) {
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
  Growth(const Args& args, Map& map, const IsNear& is_near)
      : labels_(args.labels), map_(map), is_near_(is_near) {}

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
    map_.for_neighbours(pixel, [&](i32 other) {
      if (!map_.is_free(other) || !is_near_(labels_[pixel], other)) return;
      take(queue, pixel, other);
    });
  }

  void take(Pixels& queue, i32 pixel, i32 other) {
    map_.close(other);
    labels_[other] = labels_[pixel];
    queue.push_back(other);
  }

  // First every pixel claims its neighbours by its place in the level, then it takes those that it got. A claim of an
  // earlier level is one of a pixel that is not free any more.
  void grow_shared(Pixels& queue, std::size_t level, std::int64_t n) {
    if (claims_.empty()) {
      claims_.assign(static_cast<std::size_t>(map_.pixels()), region_growing::kFree);
    }
    const auto for_claims = [&](i32 begin, i32 end, const auto& f) {
      for (i32 place = begin; place < end; ++place) {
        const i32 pixel = queue[level + static_cast<std::size_t>(place)];
        map_.for_neighbours(pixel, [&](i32 other) {
          f(place, pixel, other, claims_[static_cast<std::size_t>(other)]);
        });
      }
    };
    for_pieces(n, kSharedPiece, kGrowNanoseconds, [&](std::size_t, i32 begin, i32 end) {
      for_claims(begin, end, [&](i32 place, i32 pixel, i32 other, i32& value) {
        if (!map_.is_free(other)) return;
        const std::atomic_ref claim(value);
        i32 seen = claim.load(std::memory_order_relaxed);
        if (seen <= place || !is_near_(labels_[pixel], other)) return;
        while (place < seen &&
               !claim.compare_exchange_weak(seen, place, std::memory_order_relaxed)) {
        }
      });
    });
    std::vector<Pixels> taken(static_cast<std::size_t>(pieces_of(n, kSharedPiece)));
    for_pieces(n, kSharedPiece, kGrowNanoseconds, [&](std::size_t piece, i32 begin, i32 end) {
      for_claims(begin, end, [&](i32 place, i32 pixel, i32 other, i32 claim) {
        if (claim == place && map_.is_free(other)) take(taken[piece], pixel, other);
      });
    });
    append(queue, taken);
  }

  i32* labels_;
  Map& map_;
  const IsNear& is_near_;
  std::vector<i32> claims_;
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
  Pixels queue = pixels_with(map.pixels(), [&](i32 i) { return args.labels[i] != 0; });
  const auto anywhere = [](i32, i32) { return true; };
  Growth growth(args, map, anywhere);
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
  map.allow(args.planes);
  Pixels queue =
      pixels_with(map.pixels(), [&](i32 i) { return args.labels[i] != 0 && args.contour[i] != 0; });
  with_float(scores.scalar_type(), [&]<class Scalar>() {
    means_cpu<Scalar, double>(mean_args(p, p.kernels, *p.embeddings, *p.means, {}, args.channels),
                              num_labels);
    const auto is_near = [&](i32 label, i32 pixel) {
      return region_growing::is_near<Scalar>(args, label, pixel);
    };
    Growth(args, map, is_near).run(queue);
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
