// Multi-scale deformable attention: each query and head takes a weighted sum of bilinear samples at points of its own, P
// on each of L levels of a feature pyramid. Shared by CPU and GPU. Outside of a level everything is 0 (sampler B: samples
// fade out within a pixel of the border). What the samples need besides the value comes in one of two forms:
//   locations and weights as they are, or, with references, offsets from reference points and logits of a softmax.
// Floor: e (b s m d + b q m d + 3 b q m l p) bytes. What binds are the taps, 4 e b q m l p d bytes through L1 and L2.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln::multi_scale_deformable_attention {

// Where a sample that is outside has no pixel; every pixel lies above it.
constexpr i32 kOutside = -2147483647 - 1;

// Of `merge`: samples that a thread sorts, and pixels of a level beside and below each other that it sorts them to.
constexpr i32 kSamplesOfThread = 4;
constexpr i32 kWindow = 48;
// A pixel has 24 bits there.
constexpr i64 kMostMerged = i64(1) << 24;
// Of its shared memory, at most.
constexpr i64 merge_bytes(i64 scalar_bytes, i64 channels, i64 queries, i64 block_size) {
  const i64 shares = 4 * kSamplesOfThread * block_size * 8, counts = 4 * kWindow * kWindow;
  return queries * (channels * scalar_bytes + 12) + shares + counts + block_size + 512;
}

struct Args {
  const void* value;   // (b, s, m, d)
  const i64* shapes;   // (l, 2): height and width of a level
  const i64* starts;   // (l,): its first pixel among s
  const u8* mask;      // (b, s), not 0: the pixel counts as 0; null for none
  const void* places;  // (b, q, m, l, p, 2): x and y in parts of the level; with references offsets
  const void* weights;     // (b, q, m, l, p); with references logits
  const void* references;  // (b, q, l, reference_size): x, y and, of 4, width, height; or null
  void* output;            // (b, q, m, d): the output, or its gradient
  void* grad_value;        // (b, s, m, d): the gradient, or float sums where queries scatter
  void* grad_places;       // as places; `positions` says of what
  void* grad_weights;      // as weights
  void* placed;            // (b, m, q, l, p) of Placed
  // (b, m, cells_of), then 1: how many samples a cell has, and then where they end in the list of their image and head;
  // whether levels share pixels
  i32* ends;
  i32* ranks;    // (b, m, q, l, p): which one of its cell's a sample is, in any order
  i32* samples;  // (b, m, q * l * p): those that are inside, by cell
  void* sums;    // (b, m, cells_of, 2, d): what a pixel gets, and what the one below it
  void* seams;   // (b, m, runs_of, 2, 2, d): the same at the beginning and the end of each run
  i64 b, s, m, d, q, l, p;
  i64 reference_size;
  i64 positions;  // the gradient is that of positions in pixels, in the accumulator's type
};

// Of an image and head: a cell for each pixel, and empty ones up to a whole pack of 16 bytes.
TORCHKILN_HD i64 cells_of(const Args& args) { return (args.s + 3) / 4 * 4; }

// Samples that a thread counts at once.
constexpr i32 kCountedByThread = 8;
// Samples that the deterministic gradient adds up one after the other.
constexpr i32 kRun = 128;
TORCHKILN_HD i64 runs_of(const Args& args) { return (args.q * args.l * args.p + kRun - 1) / kRun; }

// A level; 0 by 0, without samples, where what it says does not fit into the value.
struct Level {
  i32 h, w, start;
};

TORCHKILN_HD Level level_of(const i64* shapes, const i64* starts, i64 pixels, i64 level) {
  const i64 h = shapes[2 * level], w = shapes[2 * level + 1], start = starts[level];
  const bool fits = h > 0 && w > 0 && h <= pixels && w <= pixels && start >= 0 && start <= pixels &&
                    h * w <= pixels - start;
  return fits ? Level{i32(h), i32(w), i32(start)} : Level{0, 0, 0};
}

// In pixels of its level.
template <class T>
struct Position {
  T y, x;
};

// One query of one image and head, and where its samples stand in `places` and `weights`.
struct Query {
  i64 first;      // its first sample
  i64 reference;  // its first reference point
};

TORCHKILN_HD Query query_at(const Args& args, i64 image, i64 head, i64 query) {
  const i64 row = image * args.q + query;
  return {(row * args.m + head) * args.l * args.p, row * args.l};
}

// A place or its gradient as it stands in memory: aligned, so that it is read at once.
template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};

// What an offset of one means in pixels, by axis.
template <class T, class Place>
TORCHKILN_HD Position<T> scale_of(const Args& args, Query query, i32 level, Level size) {
  if (args.references == nullptr) return {T(size.h), T(size.w)};
  if (args.reference_size == 2) return {T(1), T(1)};
  const Place* box = static_cast<const Place*>(args.references) + (query.reference + level) * 4;
  const T share = fast_quotient(T(0.5), T(args.p));
  return {load(box[3]) * share * T(size.h), load(box[2]) * share * T(size.w)};
}

template <class T, class Place>
TORCHKILN_HD Position<T> position_of(const Args& args, Query query, i32 sample, i32 level,
                                     Level size) {
  const Pair<Place> place = static_cast<const Pair<Place>*>(args.places)[query.first + sample];
  const Position<T> scale = scale_of<T, Place>(args, query, level, size);
  Position<T> result = {load(place.y) * scale.y - T(0.5), load(place.x) * scale.x - T(0.5)};
  if (args.references != nullptr) {
    const Place* reference = static_cast<const Place*>(args.references) +
                             (query.reference + level) * args.reference_size;
    result.y += load(reference[1]) * T(size.h);
    result.x += load(reference[0]) * T(size.w);
  }
  return result;
}

// The pixel up and to the left of a position, perhaps one before the level's.
struct Corner {
  i32 y, x;
  bool inside;  // whether there is a sample at all; not for NaN
};

template <class T>
TORCHKILN_HD Corner corner_of(Position<T> at, Level level) {
  // A level without pixels has a margin, but nothing in it.
  const bool inside =
      level.h > 0 && at.y > T(-1) && at.x > T(-1) && at.y < T(level.h) && at.x < T(level.w);
  if (!inside) return {0, 0, false};
  return {i32(floor_of(at.y)), i32(floor_of(at.x)), true};
}

// The four pixels around a position: upper left, upper right, lower left, lower right. One that is masked or off the level
// is not live: it has the weight 0, and the place of one that is.
struct alignas(16) Pixels {
  i32 at[4];
};
template <class T>
struct alignas(16) Weights {
  T at[4];
};
template <class T>
struct Taps {
  Pixels pixels;
  Weights<T> weights;
  T fraction_y, fraction_x;
  // The upper left pixel, counted on where it lies before the level; kOutside for no sample.
  i32 first;
  u32 live;  // a bit for each pixel; 0: none to add
};

// Takes the masked pixels out of the live ones.
template <class T>
TORCHKILN_HD void drop_masked(Taps<T>& taps, const u8* mask) {
  i32 some = 0;
  for (i32 i = 0; i < 4; ++i) {
    if ((taps.live >> i & 1u) != 0 && mask[taps.pixels.at[i]] != 0) taps.live &= ~(1u << i);
    if ((taps.live >> i & 1u) != 0) some = taps.pixels.at[i];
  }
  for (i32 i = 0; i < 4; ++i) {
    if ((taps.live >> i & 1u) != 0) continue;
    taps.pixels.at[i] = some;
    taps.weights.at[i] = T(0);
  }
}

// mask: of the image, or null.
template <class T>
TORCHKILN_HD Taps<T> taps_at(Position<T> at, Level level, const u8* mask) {
  Taps<T> taps = {{{0, 0, 0, 0}}, {{T(0), T(0), T(0), T(0)}}, T(0), T(0), kOutside, 0};
  const Corner corner = corner_of(at, level);
  if (!corner.inside) return taps;
  const T y = at.y - T(corner.y), x = at.x - T(corner.x);
  const bool has_upper = corner.y >= 0, has_lower = corner.y + 1 < level.h;
  const bool has_left = corner.x >= 0, has_right = corner.x + 1 < level.w;
  taps.fraction_y = y;
  taps.fraction_x = x;
  taps.first = level.start + corner.y * level.w + corner.x;
  // A row or column off the level gives way to the other one.
  const i32 upper = has_upper ? taps.first : taps.first + level.w;
  const i32 lower = has_lower ? taps.first + level.w : taps.first;
  const i32 left = has_left ? 0 : 1, right = has_right ? 1 : 0;
  const T of_upper = has_upper ? T(1) - y : T(0), of_lower = has_lower ? y : T(0);
  const T of_left = has_left ? T(1) - x : T(0), of_right = has_right ? x : T(0);
  taps.pixels = {{upper + left, upper + right, lower + left, lower + right}};
  taps.weights = {
      {of_upper * of_left, of_upper * of_right, of_lower * of_left, of_lower * of_right}};
  taps.live = ((has_upper ? 3u : 0u) | (has_lower ? 12u : 0u)) &
              ((has_left ? 5u : 0u) | (has_right ? 10u : 0u));
  if (mask != nullptr) drop_masked(taps, mask);
  return taps;
}

// What the gradient of a sample needs of its taps.
template <class T>
struct Blend {
  T y, x;    // fractions
  u32 live;  // as in Taps

  TORCHKILN_HD T weight(i32 pixel) const {
    return (pixel / 2 != 0 ? y : T(1) - y) * (pixel % 2 != 0 ? x : T(1) - x);
  }
  TORCHKILN_HD bool has(i32 pixel) const { return (live >> pixel & 1u) != 0; }
};

// Gradients of a sample, of the products of the gradient of the output and the four pixels.
template <class T>
struct SampleGradient {
  T weight;        // of the sample's weight
  Position<T> at;  // of its position, for the weight 1
};

template <class T>
TORCHKILN_HD SampleGradient<T> gradient_of(const Blend<T>& blend, Weights<T> products) {
  T sum = T(0);
  for (i32 i = 0; i < 4; ++i) {
    if (!blend.has(i)) products.at[i] = T(0);
    sum += blend.weight(i) * products.at[i];
  }
  const T* v = products.at;
  const T y = blend.y, x = blend.x;
  return {sum,
          {(T(1) - x) * (v[2] - v[0]) + x * (v[3] - v[1]),
           (T(1) - y) * (v[1] - v[0]) + y * (v[3] - v[2])}};
}

// The lowest number.
template <class T>
constexpr T kLowest = T(-3.402823466e38f);
template <>
inline constexpr double kLowest<double> = -1.7976931348623157e308;

// The weights of a query are exp(logit - greatest) * inverse.
template <class T>
struct Softmax {
  T greatest, inverse;

  TORCHKILN_HD T operator()(T logit) const { return exp_of(logit - greatest) * inverse; }
};

template <class T, class Place>
TORCHKILN_HD T weight_of(const Args& args, Query query, i32 sample, Softmax<T> softmax) {
  const T given = load(static_cast<const Place*>(args.weights)[query.first + sample]);
  return args.references != nullptr ? softmax(given) : given;
}

// Of a position, in pixels, to the gradient of what it was made of.
template <class T, class Place>
TORCHKILN_HD void write_places(const Args& args, Query query, i32 sample, i32 level, Level size,
                               Position<T> gradient) {
  const i64 at = query.first + sample;
  if (args.positions != 0) {
    static_cast<Pair<T>*>(args.grad_places)[at] = {gradient.x, gradient.y};
    return;
  }
  const Position<T> scale = scale_of<T, Place>(args, query, level, size);
  Pair<Place> result;
  store(result.x, gradient.x * scale.x);
  store(result.y, gradient.y * scale.y);
  static_cast<Pair<Place>*>(args.grad_places)[at] = result;
}

}  // namespace torchkiln::multi_scale_deformable_attention
