// Arguments of contour_expand and pixel_group, shared by CPU and GPU: both grow labelled regions of an image by their four
// neighbours, breadth first. In the order of a queue that starts with the sources in row-major order, a pixel gets the
// label of the first source, by position, of those with the shortest way to it: so it does not matter in which order the
// pixels at one distance are looked at.
// Sources: Wang et al., "Shape Robust Text Detection with Progressive Scale Expansion Network", 2019, algorithm 1;
// Wang et al., "Efficient and Accurate Arbitrary-Shaped Text Detection with Pixel Aggregation Network", 2019, section 3.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/types.h"

namespace torchkiln::region_growing {

// A pixel that no source has reached yet.
constexpr i32 kFree = 0x7fffffff;

struct Args {
  const u8*
      planes;  // (rounds, height, width): where regions may grow; the last one is the first round's
  const i32* kernels;      // (height, width): labels to start with
  const u8* contour;       // (height, width): which labelled pixels are sources; null: all
  const i32* areas;        // (num_labels + 1,): pixels of each label; null: all are large enough
  const void* embeddings;  // (height, width, channels); null where regions grow by planes alone
  const double* means;     // (num_labels + 1, channels): of the embeddings of each label
  i32* labels;             // (height, width): the result
  i32* claims;             // (height, width): the source that reached a pixel
  i32* lists;              // (2, height, width): pixels whose neighbours are to be looked at
  i32* count;              // of the first list
  i64 rounds, min_area;
  i32 height, width, channels, num_labels;
  double threshold;  // squared
};

struct CountArgs {
  const i32* kernels;
  i32* areas;  // zeros
  i64 pixels;
  i32 num_labels;
};

// Means of values over the pixels of each label.
struct MeanArgs {
  const i32* labels;
  const void* values;  // (pixels, channels)
  void* means;  // (num_labels + 1, channels): 0 for background, and for labels without pixels
  i64* counts;  // (num_labels + 1,); null
  i64 pixels;
  i32 channels;
};

// The label that a pixel starts with: 0 for one that is out of range, or too small.
TORCHKILN_HD i32 kept(const Args& args, i64 pixel) {
  const i32 label = args.kernels[pixel];
  if (label <= 0 || label > args.num_labels) return 0;
  return args.areas == nullptr || args.areas[label] >= args.min_area ? label : 0;
}

// Is a pixel's embedding near enough to the mean of a label?
template <class Scalar>
TORCHKILN_HD bool is_near(const Args& args, i32 label, i64 pixel) {
  using T = Acc<Scalar>;
  const auto* embedding = static_cast<const Scalar*>(args.embeddings) + pixel * args.channels;
  const double* mean = args.means + i64(label) * args.channels;
  T squared = T(0);
  for (i32 c = 0; c < args.channels; ++c) {
    const T difference = T(mean[c]) - load(embedding[c]);
    squared += rounded_product(difference, difference);
  }
  return squared < T(args.threshold);
}

// The pixels above, below, to the left and to the right; the pixel itself in place of those outside the image: it is
// labelled wherever this is asked, so nothing else needs to know of borders.
struct Neighbours {
  i32 at[4];
};
TORCHKILN_HD Neighbours neighbours(i32 pixel, i32 height, i32 width) {
  const i32 y = pixel / width, x = pixel - y * width;
  return {{y > 0 ? pixel - width : pixel, y + 1 < height ? pixel + width : pixel,
           x > 0 ? pixel - 1 : pixel, x + 1 < width ? pixel + 1 : pixel}};
}

}  // namespace torchkiln::region_growing
