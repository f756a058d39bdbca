// roi_pool on the CPU.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bindings/detection/roi_pool.h"
#include "bindings/support/check.h"
#include "bindings/support/parallel.h"
#include "torchkiln/torchkiln.hpp"

namespace torchkiln::bindings {
namespace {

using roi_pool::Best;
using roi_pool::Code;
using roi_pool::Region;
using Plan = RoiPoolPlan;
using BackwardPlan = RoiPoolBackwardPlan;

// Channels of a region that one task searches, at most.
constexpr std::int64_t kSpan = 64;

template <class Scalar>
void check_images(const Tensor& boxes, const roi_pool::Shape& s) {
  using T = Acc<Scalar>;
  for (std::int64_t i = 0; i < s.rois; ++i) {
    const T image = data<T>(boxes)[5 * i];
    if (image > T(-1) && image < static_cast<T>(s.images)) continue;
    fail(TORCHKILN_ERROR_INDEX, "roi_pool", "boxes",
         "have batch indices from 0 to " + std::to_string(s.images - 1), std::to_string(image));
  }
}

// Calls f.operator()<Scalar, kCodeBytes>().
template <class F>
void with_variant(ScalarType dtype, const roi_pool::Shape& s, const F& f) {
  with_float(dtype, [&]<class Scalar>() {
    if (roi_pool_code_bytes(s) == 2) {
      f.template operator()<Scalar, 2>();
    } else {
      f.template operator()<Scalar, 4>();
    }
  });
}

// The first place in a row of a value, or of a NaN.
template <class Scalar, class T>
i32 place_of(const Scalar* row, i32 begin, T value) {
  i32 x = begin;
  while (is_nan(value) ? !is_nan(load(row[x])) : load(row[x]) != value) ++x;
  return x;
}

// The greatest of a bin of one map: of each row first, which takes no branch that could be guessed wrong, then of the
// rows; its column is looked for in the one row that has it. Nothing beats a NaN.
template <class Scalar>
Best<Acc<Scalar>> search_map(const Scalar* map, std::int64_t width, const Range& rows,
                             const Range& columns) {
  using T = Acc<Scalar>;
  auto best = roi_pool::worst<T>(rows.begin, columns.begin);
  for (i32 y = rows.begin; y < rows.end; ++y) {
    const Scalar* row = map + y * width;
    T greatest = load(row[columns.begin]);
    T sum = greatest;  // NaN if one is in the row, or infinities of both signs
    for (i32 x = columns.begin + 1; x < columns.end; ++x) {
      const T value = load(row[x]);
      greatest = value > greatest ? value : greatest;
      sum += value;
    }
    if (is_nan(sum)) {
      for (i32 x = columns.begin; x < columns.end; ++x) {
        if (is_nan(load(row[x]))) return {load(row[x]), y, x};
      }
    }
    if (greatest > best.value) {
      best.value = greatest;
      best.y = y;
    }
  }
  best.x = place_of(map + best.y * width, columns.begin, best.value);
  return best;
}

// The same bin of n <= kSpan maps: side by side with channels last, where neighbours are `channels` apart.
template <class Scalar>
void search(const Plan& p, const Scalar* first_map, std::int64_t n, const Range& rows,
            const Range& columns, Best<Acc<Scalar>>* best) {
  const roi_pool::Shape& s = p.args.shape;
  if (!p.channels_last) {
    for (std::int64_t c = 0; c < n; ++c)
      best[c] = search_map(first_map + c * s.height * s.width, s.width, rows, columns);
    return;
  }
  std::fill_n(best, n, roi_pool::worst<Acc<Scalar>>(rows.begin, columns.begin));
  for (i32 y = rows.begin; y < rows.end; ++y) {
    for (i32 x = columns.begin; x < columns.end; ++x) {
      const Scalar* at = first_map + (y * s.width + x) * s.channels;
      for (std::int64_t c = 0; c < n; ++c) best[c].take(load(at[c]), y, x);
    }
  }
}

// One region and the channels [first, first + n), n <= kSpan: they share the geometry.
template <class Scalar, int kCodeBytes>
void pool_region(const Plan& p, std::int64_t roi, std::int64_t first, std::int64_t n) {
  using T = Acc<Scalar>;
  const roi_pool::Shape& s = p.args.shape;
  const Region<T> region = roi_pool::load_region(static_cast<const T*>(p.args.boxes), roi, s);
  const std::int64_t cells = s.height * s.width, bins = s.pooled_height * s.pooled_width;
  const std::int64_t image = std::max<std::int64_t>(region.image, 0) * s.channels * cells;
  const auto* map =
      static_cast<const Scalar*>(p.args.input) + image + (p.channels_last ? first : first * cells);
  const std::int64_t step = p.channels_last ? 1 : bins;
  auto* argmax = static_cast<Code<kCodeBytes>*>(p.args.argmax);
  Best<T> best[kSpan];
  for (std::int64_t bin = 0; bin < bins; ++bin) {
    const Range rows = region.y.bin_of(static_cast<i32>(bin / s.pooled_width));
    const Range columns = region.x.bin_of(static_cast<i32>(bin % s.pooled_width));
    const bool is_empty = region.image < 0 || rows.is_empty() || columns.is_empty();
    if (!is_empty) search(p, map, n, rows, columns, best);
    std::int64_t at = p.channels_last ? (roi * bins + bin) * s.channels + first
                                      : (roi * s.channels + first) * bins + bin;
    for (std::int64_t c = 0; c < n; ++c, at += step) {
      store(static_cast<Scalar*>(p.args.output)[at], is_empty ? T(0) : best[c].value);
      if (argmax == nullptr) continue;
      argmax[at] = is_empty ? roi_pool::kNoCell<kCodeBytes>
                            : roi_pool::encode<kCodeBytes>(best[c].y, best[c].x);
    }
  }
}

std::tuple<Tensor, Tensor> cpu(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                               std::int64_t pooled_width, double spatial_scale, bool rounding,
                               bool /*deterministic*/, bool with_argmax) {
  const Plan p = plan_roi_pool(input, boxes, pooled_height, pooled_width, spatial_scale, rounding,
                               with_argmax);
  const roi_pool::Shape& s = p.args.shape;
  const std::int64_t span = p.channels_last ? kSpan : 16, groups = ceil_div(s.channels, span);
  // A region of a quarter of the image, at two nanoseconds a cell.
  const std::int64_t nanoseconds =
      span * (pooled_height * pooled_width * 8 + s.height * s.width / 8);
  with_variant(p.input.scalar_type(), s, [&]<class Scalar, int kCodeBytes>() {
    check_images<Scalar>(p.boxes, s);
    parallel_for(s.rois * groups, nanoseconds, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t first = i % groups * span;
        pool_region<Scalar, kCodeBytes>(p, i / groups, first,
                                        std::min<std::int64_t>(span, s.channels - first));
      }
    });
  });
  return {p.output, p.argmax};
}

// What one thread owns in the backward: some channels of one image, summed in accumulator type.
template <class Scalar, int kCodeBytes>
void scatter_channels(const BackwardPlan& p, std::int64_t image, std::int64_t first, std::int64_t n,
                      std::vector<Acc<Scalar>>& sums) {
  using T = Acc<Scalar>;
  const roi_pool::Shape& s = p.args.shape;
  const std::int64_t cells = s.height * s.width, bins = s.pooled_height * s.pooled_width;
  const auto* grad_output = static_cast<const Scalar*>(p.args.grad_output);
  const auto* argmax = static_cast<const Code<kCodeBytes>*>(p.args.argmax);
  const auto* boxes = static_cast<const T*>(p.args.boxes);
  constexpr u32 kMask = (u32{1} << (4 * kCodeBytes)) - 1;
  auto* grad_input = static_cast<Scalar*>(p.args.grad_input) + image * s.channels * cells;
  T* sum = sums.data();
  if constexpr (std::is_same_v<Scalar, T>) {
    if (!p.channels_last) sum = grad_input + first * cells;  // its own buffer: nothing to copy
  }
  std::fill_n(sum, cells * n, T(0));
  for (std::int64_t roi = 0; roi < s.rois; ++roi) {
    if (!(boxes[5 * roi] > T(-1)) || static_cast<std::int64_t>(boxes[5 * roi]) != image) continue;
    for (std::int64_t bin = 0; bin < bins; ++bin) {
      const std::int64_t at = p.channels_last ? (roi * bins + bin) * s.channels + first
                                              : (roi * s.channels + first) * bins + bin;
      for (std::int64_t c = 0; c < n; ++c) {
        const u32 code = argmax[at + c];
        if (code == roi_pool::kNoCell<kCodeBytes>) continue;
        const std::int64_t y = code >> (4 * kCodeBytes), x = code & kMask;
        sum[(y * s.width + x) * n + c] += load(grad_output[at + c]);
      }
    }
  }
  if (sum != sums.data()) return;
  for (std::int64_t cell = 0; cell < cells; ++cell) {
    for (std::int64_t c = 0; c < n; ++c) {
      store(grad_input[p.channels_last ? cell * s.channels + first + c : first * cells + cell],
            sum[cell * n + c]);
    }
  }
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& argmax, const Tensor& boxes,
                    std::int64_t images, std::int64_t height, std::int64_t width,
                    double spatial_scale, bool rounding, bool /*deterministic*/) {
  const BackwardPlan p = plan_roi_pool_backward(grad_output, argmax, boxes, images, height, width,
                                                spatial_scale, rounding);
  const roi_pool::Shape& s = p.args.shape;
  // A cache line of channels, so that threads do not share one.
  const std::int64_t span = p.channels_last ? 16 : 1, groups = ceil_div(s.channels, span);
  const std::int64_t nanoseconds =
      span * (s.height * s.width + s.rois * s.pooled_height * s.pooled_width);
  with_variant(p.grad_output.scalar_type(), s, [&]<class Scalar, int kCodeBytes>() {
    parallel_for(images * groups, nanoseconds, [&](std::int64_t begin, std::int64_t end) {
      std::vector<Acc<Scalar>> sums;
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t first = i % groups * span,
                           n = std::min<std::int64_t>(span, s.channels - first);
        sums.resize(static_cast<std::size_t>(s.height * s.width * n));
        scatter_channels<Scalar, kCodeBytes>(p, i / groups, first, n, sums);
      }
    });
  });
  return p.grad_input;
}

}  // namespace
}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("roi_pool", TORCH_BOX(&torchkiln::bindings::cpu));
  m.impl("_roi_pool_backward", TORCH_BOX(&torchkiln::bindings::backward_cpu));
}
