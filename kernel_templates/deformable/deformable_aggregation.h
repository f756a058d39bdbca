// Deformable aggregation: a query's features are a weighted sum of bilinear samples at points that each camera sees in
// another place, on several levels. Shared by CPU and GPU.
// Floor: e (touched share of the maps + output) bytes, 8 for each point and camera, and the weights of those that are
// seen. What binds are the taps: 4 e C for each level of a point that a camera sees.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/any_float.h"

namespace torchkiln::deformable_aggregation {

constexpr i32 kMostMaps = 8;     // levels that are given one by one
constexpr i32 kMostLevels = 32;  // levels in one tensor
constexpr i64 kMostChannels = 2048;
constexpr i64 kPairsOfPart = 256;  // points in cameras that a block of `forward` takes at most

// Divides numbers from 0 to 2^31 - 1 by the same number, with a product.
struct Divisor {
  u32 factor, shift;

  Divisor() = default;
  TORCHKILN_HD explicit Divisor(i64 by) : factor(0), shift(31) {
    while (i64(1) << (shift - 31) < by) ++shift;
    factor = u32(((u64(1) << shift) + u64(by) - 1) / u64(by));
  }
  TORCHKILN_HD i32 quotient(i32 of) const { return i32(u64(u32(of)) * factor >> shift); }
};

struct Args {
  const void* maps[kMostMaps];  // (bs, rows, C) in maps[0]; or (bs, M, h, w, C) of each level
  void* gradients[kMostMaps];   // as maps; sums of floats for `points`
  const void* shapes;           // (M, L, 2) h and w in maps[0]; null for levels one by one
  const void* starts;           // (M, L) first row of a map
  const void* locations;        // (bs, Q, P, M, 2) x and y, from 0 to 1 in the image
  const void* weights;          // a row of G for each query, point, camera and level
  void* normalizer;             // (bs, Q, 2, G): see `normalized`; null where weights are final
  void* partials;               // (parts, bs, Q, C) sums of parts of a query; null where it has one
  void* output;                 // (bs, Q, C)
  const void* grad_output;      // (bs, Q, C)
  void* grad_locations;         // as locations
  void* grad_weights;           // as weights
  i32* ends;                    // how many samples there are up to the end of a bin
  i32* sums;                    // of those of neighbouring bins
  i32* samples;                 // ((query * P + point) * M + camera) * L + level, by bins
  i32 h[kMostMaps], w[kMostMaps];                 // of levels that are given one by one
  i64 wide_indices;                               // shapes and starts are 64 bits wide, else 32
  i64 location_type, output_type, gradient_type;  // FloatType
  i64 rows;                                       // of an image in maps[0]
  i64 batch, queries, points, cameras, levels, channels, groups;
  i64 point_stride, camera_stride, level_stride;  // of weights, inside of a query
  i64 part;               // points in cameras that a block of `forward` takes
  Divisor maps_of_image;  // cameras * levels
  Divisor points_of_query;
};

// One level of one camera of one image: `first` is a row of maps[source]. Without pixels, h is 0.
struct Map {
  i64 first;
  i32 h, w, source;
};

// What the index tensors say of a map.
struct Extent {
  i64 h, w, first;
};

TORCHKILN_HD Extent extent_at(const Args& args, i64 at) {
  const auto read = [at](const auto* shapes, const auto* starts) {
    return Extent{i64(shapes[2 * at]), i64(shapes[2 * at + 1]), i64(starts[at])};
  };
  return args.wide_indices
             ? read(static_cast<const i64*>(args.shapes), static_cast<const i64*>(args.starts))
             : read(static_cast<const i32*>(args.shapes), static_cast<const i32*>(args.starts));
}

// A map that does not lie inside of the rows has no pixels.
TORCHKILN_HD Map map_of(const Args& args, i64 image, i32 camera, i32 level) {
  if (args.shapes == nullptr) {
    const i32 h = args.h[level], w = args.w[level];
    return {(image * args.cameras + camera) * h * w, h, w, level};
  }
  const auto [h, w, first] = extent_at(args, i64(camera) * args.levels + level);
  const bool inside = h > 0 && w > 0 && h <= args.rows && w <= args.rows && first >= 0 &&
                      h * w <= args.rows - first;
  if (!inside) return {0, 0, 0, 0};
  return {image * args.rows + first, i32(h), i32(w), 0};
}

// Where a camera sees a point; `pair` counts cameras of points of queries.
template <class T>
TORCHKILN_HD void location_at(const Args& args, i64 pair, T& x, T& y) {
  const auto read = [&](const auto* from) {
    x = T(load(from[2 * pair]));
    y = T(load(from[2 * pair + 1]));
  };
  switch (args.location_type) {
    case kHalfNumbers:
      return read(static_cast<const half*>(args.locations));
    case kBfloat16Numbers:
      return read(static_cast<const bfloat16*>(args.locations));
    case kDoubleNumbers:
      return read(static_cast<const double*>(args.locations));
    default:
      return read(static_cast<const float*>(args.locations));
  }
}

// Whether a camera sees the point. NaN is not seen.
template <class T>
TORCHKILN_HD bool is_seen(T x, T y) {
  return x > T(0) && x < T(1) && y > T(0) && y < T(1);
}

// What a sample takes of a map: the rows of four pixels, -1 for those outside, which count as 0; and how far it lies
// from the first towards the last. Sampler B: pixel centres at half numbers, nothing is clamped.
template <class T>
struct alignas(16) Tap {
  i32 pixels[4];
  T down, right;
  i32 weight;  // where the row of weights begins, inside of the query
  i32 source;

  TORCHKILN_HD T share(int corner) const {
    return (corner & 2 ? down : T(1) - down) * (corner & 1 ? right : T(1) - right);
  }
};

template <class T>
TORCHKILN_HD Tap<T> tap_of(const Map& map, T x, T y) {
  Tap<T> tap = {{-1, -1, -1, -1}, T(0), T(0), 0, map.source};
  if (map.h == 0 || map.w == 0) return tap;
  const T down = y * T(map.h) - T(0.5), right = x * T(map.w) - T(0.5);
  const T top = floor_of(down), left = floor_of(right);
  tap.down = down - top;
  tap.right = right - left;
  const i32 i = i32(top), j = i32(left), first = i32(map.first);
  const bool rows[2] = {i >= 0 && i < map.h, i + 1 < map.h};
  const bool columns[2] = {j >= 0 && j < map.w, j + 1 < map.w};
  for (int corner = 0; corner < 4; ++corner) {
    const int di = corner >> 1, dj = corner & 1;
    if (rows[di] && columns[dj]) tap.pixels[corner] = first + (i + di) * map.w + j + dj;
  }
  return tap;
}

TORCHKILN_HD i64 weights_of_query(const Args& args, i64 query) {
  return query * (args.points * args.cameras * args.levels * args.groups);
}

// Where the row of weights of a point, camera and level begins, inside of its query.
TORCHKILN_HD i32 weight_row(const Args& args, i32 point, i32 camera, i32 level) {
  return i32(point * args.point_stride + camera * args.camera_stride + level * args.level_stride);
}

// How many parts the points of a query are in.
TORCHKILN_HD i32 parts_of(const Args& args) {
  return i32((args.points * args.cameras + args.part - 1) / args.part);
}

// The greatest logit and the sum of exp(logit - greatest), one after the other.
template <class T>
struct Softmax {
  T most, sum;

  TORCHKILN_HD static T scale(T from, T to) { return from == to ? T(1) : exp_of(from - to); }
  TORCHKILN_HD void add(T logit) {
    if (logit > most) {
      sum = sum * scale(most, logit) + T(1);
      most = logit;
    } else {
      sum += scale(logit, most);
    }
  }
  TORCHKILN_HD void add(const Softmax& other) {
    const T both = max_of(other.most, most);
    sum = sum * scale(most, both) + other.sum * scale(other.most, both);
    most = both;
  }
  // Not a number where the greatest is infinite, as torch has it.
  TORCHKILN_HD T inverse() const { return T(1) / sum + (most - most); }
};
template <class T>
TORCHKILN_HD Softmax<T> empty_softmax() {
  return {T(bits_float(0xff800000u)), T(0)};
}

// A group's part of the normalizer of a query: the greatest logit, and the inverse of the sum.
template <class T>
struct Normalizer {
  T most, inverse;
  bool used;

  TORCHKILN_HD T operator()(T weight) const {
    return used ? exp_of(weight - most) * inverse : weight;
  }
};

template <class T>
TORCHKILN_HD Normalizer<T> normalizer_of(const Args& args, i64 query, i32 group) {
  if (args.normalizer == nullptr) return {T(0), T(1), false};
  const T* row = static_cast<const T*>(args.normalizer) + query * 2 * args.groups;
  return {row[group], row[args.groups + group], true};
}

// ---- gradient of maps ----

// A sample on a map: the pixel above and to the left of it, which may lie just outside, and how far it lies from there.
template <class T>
struct Touch {
  i32 top, left;
  T down, right;
};

template <class T>
TORCHKILN_HD Touch<T> touch_of(i32 h, i32 w, T x, T y) {
  const T down = y * T(h) - T(0.5), right = x * T(w) - T(0.5);
  const T top = floor_of(down), left = floor_of(right);
  return {i32(top), i32(left), down - top, right - left};
}

constexpr i32 kBinsOfBlock = 4096;  // that a block of `sum` or `place` has
constexpr i32 kQuad = 4;            // rows that are crowded together
constexpr i32 kMostRows = 32;       // that a warp of `gather` owns
constexpr i32 kMostGroups = 8;      // that a warp sums the channels of

// Shares that a warp of `gather` adds up for its run of rows; with more of them they are crowded.
TORCHKILN_HD i32 most_shares(i32 rows) { return max_of(16 * rows, 128); }

// Neighbouring rows of one source of an image: [first, first + rows), none behind the last. There are fewer than 2^31 rows
// in all.
struct Run {
  i32 source, image, first, rows;
};

TORCHKILN_HD i32 rows_of(const Args& args, i32 source) {
  return i32(args.shapes != nullptr ? args.rows : args.cameras * args.h[source] * args.w[source]);
}
TORCHKILN_HD i32 sources_of(const Args& args) {
  return args.shapes != nullptr ? 1 : i32(args.levels);
}

// Rows have a bin each, where samples are listed that have there the pixel above and to the left of them; those just outside
// are listed at the border. The first bin of a source:
TORCHKILN_HD i64 first_bin(const Args& args, i32 source) {
  i64 first = 0;
  TORCHKILN_ROLLED
  for (i32 i = 0; i < source; ++i) first += args.batch * rows_of(args, i);
  return first;
}

// Of `rows` rows, as quads are counted: kMostRows begin with a source.
TORCHKILN_HD i64 quads_of(i64 rows) {
  return (rows + kMostRows - 1) / kMostRows * (kMostRows / kQuad);
}

// Channels that a warp sums, at most `most`: no more than lie in kMostGroups groups.
TORCHKILN_HD i32 chunk_channels(i32 channels, i32 groups, i32 most) {
  const i32 each = channels / groups, whole = most / each;
  // Fewer than these touch one more on each side at worst.
  return whole < kMostGroups - 1 ? most : min_of(whole, kMostGroups) * each;
}
TORCHKILN_HD i32 chunk_count(i32 channels, i32 groups, i32 most) {
  const i32 each = chunk_channels(channels, groups, most);
  return (channels + each - 1) / each;
}

TORCHKILN_HD i32 quads_of_image(const Args& args) {
  i32 quads = 0;
  TORCHKILN_ROLLED
  for (i32 source = 0; source < sources_of(args); ++source) {
    quads += i32(quads_of(rows_of(args, source)));
  }
  return quads;
}

// Up to `rows` rows from a quad on, whose number may be too large: its image is then beyond the last.
TORCHKILN_HD Run run_at(const Args& args, i32 quad, i32 rows) {
  const i32 sources = sources_of(args), quads = quads_of_image(args);
  const u32 image = u32(quad) / u32(quads);
  Run run = {0, i32(image), quad - i32(image) * quads, 0};
  TORCHKILN_ROLLED
  for (; run.source < sources - 1; ++run.source) {
    const i32 own = i32(quads_of(rows_of(args, run.source)));
    if (run.first < own) break;
    run.first -= own;
  }
  run.first *= kQuad;
  run.rows = min_of(rows, rows_of(args, run.source) - run.first);
  return run;
}

}  // namespace torchkiln::deformable_aggregation
