// roi_pool: schema, checks and shapes, CPU loops, launches.
// SPDX-License-Identifier: Apache-2.0
#include "detection/roi_pool.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using roi_pool::Args;
using roi_pool::BackwardArgs;
using roi_pool::Best;
using roi_pool::Code;
using roi_pool::Range;
using roi_pool::Region;

constexpr const char* kOp = "roi_pool";
constexpr std::int64_t kMaxI32 = 2'147'483'647, kMaxGridY = 65'535;
constexpr std::int64_t kWarp = 32;

struct Statics {
  std::int64_t scalar, index, code_bytes;
};
struct ChannelsLastStatics {
  std::int64_t scalar, index, code_bytes, vector;
};
struct BackwardStatics {
  std::int64_t scalar, index, channels_last, code_bytes;
};
struct Sizes {
  std::int64_t rois, channels, cells;  // cells of one image
};
struct BackwardSizes {
  std::int64_t rois, channels, height, width, images;
};
struct Tunables {
  std::int64_t block_size, channels, by_columns;
};
struct ChannelsLastTunables {
  std::int64_t block_size, lanes;
};
struct BackwardTunables {
  std::int64_t block_size, tile_height, tile_width;
};

using Forward = Kernel<Args, Statics, Sizes, Tunables>;
using ForwardChannelsLast = Kernel<Args, ChannelsLastStatics, Sizes, ChannelsLastTunables>;
using Backward = Kernel<BackwardArgs, BackwardStatics, BackwardSizes, BackwardTunables>;

// Channels a thread: no more than 16 bytes of values, nor of their cells' codes.
std::int64_t full_vector(std::int64_t scalar, std::int64_t code_bytes) {
  if (scalar == TORCHKILN_DOUBLE) return 2;
  return scalar == TORCHKILN_FLOAT || code_bytes == 4 ? 4 : 8;
}

// One block per region and group of channels; a group count past the grid's limit has failed in plan().
Geometry over_regions(std::int64_t rois, std::int64_t groups, std::int64_t block_size) {
  Geometry g = linear(rois, block_size);
  g.grid[1] = static_cast<std::uint32_t>(groups);
  return g;
}

const Forward forward_kernel({
    .path = "detection/roi_pool.cuh",
    .entry = "forward",
    .operators = {"roi_pool"},
    .statics = {types("scalar", kFloatTypes), types("index", {TORCHKILN_I32, TORCHKILN_I64}),
                ints("code_bytes", {2, 4})},
    .sizes = {{"rois", TORCHKILN_BUCKET_POW2},
              {"channels", TORCHKILN_BUCKET_POW2},
              {"cells", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {128, 256}), ints("channels", {8, 16, 32, 64}),
                 bools("by_columns")},
    .defaults = {{256, 32, 1}},
    .geometry =
        [](const Forward::Problem& p, const Tunables& t) {
          return over_regions(p.sizes.rois, ceil_div(p.sizes.channels, t.channels), t.block_size);
        },
});

const ForwardChannelsLast forward_channels_last_kernel({
    .path = "detection/roi_pool.cuh",
    .entry = "forward_channels_last",
    .operators = {"roi_pool"},
    .statics = {types("scalar", kFloatTypes), types("index", {TORCHKILN_I32, TORCHKILN_I64}),
                ints("code_bytes", {2, 4}), ints("vector", {1, 2, 4, 8})},
    .sizes = {{"rois", TORCHKILN_BUCKET_POW2},
              {"channels", TORCHKILN_BUCKET_POW2},
              {"cells", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512}), ints("lanes", {8, 16, 32})},
    .defaults = {{256, 8}},
    .valid =
        [](const ChannelsLastStatics& s) {
          return s.vector == 1 || s.vector == full_vector(s.scalar, s.code_bytes);
        },
    .geometry =
        [](const ForwardChannelsLast::Problem& p, const ChannelsLastTunables& t) {
          return over_regions(p.sizes.rois, ceil_div(p.sizes.channels, t.lanes * p.statics.vector),
                              t.block_size);
        },
});

// The sums of a tile for one channel a thread, and the stages in which channels first is turned round.
std::int64_t backward_shared_bytes(const BackwardStatics& s, const BackwardTunables& t) {
  const std::int64_t acc = s.scalar == TORCHKILN_DOUBLE ? 8 : 4;
  const std::int64_t stage = s.channels_last ? 0 : t.block_size * 17 * (acc + 4);
  return stage + t.block_size * t.tile_height * t.tile_width * acc;
}
bool backward_fits(const Backward::Problem& p, const BackwardTunables& t) {
  constexpr std::int64_t kStatic = 8'192;  // the list and the sums of a scan, rounded up
  return backward_shared_bytes(p.statics, t) + kStatic <= p.device.shared_bytes_per_block;
}

const std::vector<BackwardTunables> kBackwardDefaults = {{128, 8, 16}, {64, 8, 16}, {32, 8, 8}};

const Backward backward_kernel({
    .path = "detection/roi_pool.cuh",
    .entry = "backward",
    .operators = {"roi_pool"},
    .statics = {types("scalar", kFloatTypes), types("index", {TORCHKILN_I32, TORCHKILN_I64}),
                bools("channels_last"), ints("code_bytes", {2, 4})},
    .sizes = {{"rois", TORCHKILN_BUCKET_POW2},
              {"channels", TORCHKILN_BUCKET_POW2},
              {"height", TORCHKILN_BUCKET_NONE},
              {"width", TORCHKILN_BUCKET_NONE},
              {"images", TORCHKILN_BUCKET_NONE}},
    .tunables = {ints("block_size", {32, 64, 128, 256}), ints("tile_height", {4, 8, 16}),
                 ints("tile_width", {8, 16, 32})},
    .defaults = kBackwardDefaults,
    .legal = &backward_fits,
    .choose =
        [](const Backward::Problem& p) {
          std::uint32_t row = 0;
          while (row + 1 < kBackwardDefaults.size() && !backward_fits(p, kBackwardDefaults[row]))
            ++row;
          return row;
        },
    .geometry =
        [](const Backward::Problem& p, const BackwardTunables& t) {
          const std::int64_t tiles =
              ceil_div(p.sizes.height, t.tile_height) * ceil_div(p.sizes.width, t.tile_width);
          Geometry g = over_regions(p.sizes.images * tiles,
                                    ceil_div(p.sizes.channels, t.block_size), t.block_size);
          g.dynamic_shared_bytes = static_cast<std::uint32_t>(backward_shared_bytes(p.statics, t));
          return g;
        },
});

// The kernel arguments, and the tensors that keep their pointers alive.
struct Plan {
  Tensor input, boxes, output, argmax;
  bool channels_last;
  Args args;
};
struct BackwardPlan {
  Tensor grad_output, argmax, boxes, grad_input;
  bool channels_last;
  BackwardArgs args;
};

// torch calls some tensors both; those count as channels first.
bool is_channels_last(const Tensor& t) {
  const std::int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const std::array<std::int64_t, 4> strides = {h * w * c, 1, w * c, c};
  for (std::int64_t i = 0; i < 4; ++i) {
    if (t.size(i) != 1 && t.stride(i) != strides[static_cast<std::size_t>(i)]) return false;
  }
  return !t.is_contiguous();
}

Tensor empty_like_layout(const Tensor& like, ScalarType dtype,
                         const std::array<std::int64_t, 4>& shape, bool channels_last) {
  if (!channels_last) return empty(like, dtype, Shape(shape));
  const auto [n, c, h, w] = shape;
  const std::array<std::int64_t, 4> strides = {h * w * c, 1, w * c, c};
  return empty_strided(like, dtype, Shape(shape), Shape(strides));
}

Tensor as_layout(const Tensor& tensor, bool channels_last) {
  if (!channels_last) return as_contiguous(tensor);
  if (is_channels_last(tensor)) return tensor;
  Tensor copy =
      empty_like_layout(tensor, tensor.scalar_type(),
                        {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}, true);
  torch::stable::copy_(copy, tensor);
  return copy;
}

std::int64_t code_bytes_of(const roi_pool::Shape& s) {
  return std::max(s.height, s.width) <= roi_pool::kMaxNarrowSide ? 2 : 4;
}
ScalarType code_dtype(const roi_pool::Shape& s) {
  return code_bytes_of(s) == 2 ? ScalarType::Short : ScalarType::Int;
}

void check_boxes(const Tensor& input, const Tensor& boxes) {
  check_floating(kOp, "boxes", boxes);
  check_rows(kOp, "boxes", boxes, 5);
  check_same_device(kOp, "boxes", boxes, "input", input);
}

roi_pool::Shape plan_shape(const std::array<std::int64_t, 4>& input, std::int64_t rois,
                           std::int64_t pooled_height, std::int64_t pooled_width,
                           double spatial_scale, bool rounding) {
  for (const std::int64_t pooled : {pooled_height, pooled_width}) {
    if (pooled >= 1 && pooled <= roi_pool::kMaxPooled) continue;
    fail(TORCHKILN_ERROR_VALUE, kOp, "output_size",
         "be from 1 to " + std::to_string(roi_pool::kMaxPooled), std::to_string(pooled));
  }
  if (!(spatial_scale > 0)) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "spatial_scale", "be above 0", std::to_string(spatial_scale));
  }
  if (std::max(input[2], input[3]) > roi_pool::kMaxSide) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "input",
         "have sides of at most " + std::to_string(roi_pool::kMaxSide),
         std::to_string(std::max(input[2], input[3])));
  }
  if (input[1] > 8 * kMaxGridY) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "input",
         "have at most " + std::to_string(8 * kMaxGridY) + " channels", std::to_string(input[1]));
  }
  return {.images = input[0],
          .channels = input[1],
          .height = input[2],
          .width = input[3],
          .rois = rois,
          .pooled_height = pooled_height,
          .pooled_width = pooled_width,
          .spatial_scale = spatial_scale,
          .inverse_pooled_height = 1.0f / static_cast<float>(pooled_height),
          .inverse_pooled_width = 1.0f / static_cast<float>(pooled_width),
          .rounding = rounding};
}

// Coordinates are computed in float32, or float64 for float64 input, whatever dtype they come in.
Tensor boxes_for(const Tensor& boxes, const Tensor& input) {
  const ScalarType dtype =
      input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (boxes.scalar_type() == dtype) return as_contiguous(boxes);
  Tensor copy = empty(boxes, dtype, shape_of(boxes));
  torch::stable::copy_(copy, boxes);
  return copy;
}

Plan plan(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
          std::int64_t pooled_width, double spatial_scale, bool rounding, bool with_argmax) {
  check_floating(kOp, "input", input);
  check_dim(kOp, "input", input, 4, "(N, C, H, W)");
  check_boxes(input, boxes);
  const roi_pool::Shape shape =
      plan_shape({input.size(0), input.size(1), input.size(2), input.size(3)}, boxes.size(0),
                 pooled_height, pooled_width, spatial_scale, rounding);
  const bool last = is_channels_last(input);
  const std::array<std::int64_t, 4> out = {shape.rois, shape.channels, pooled_height, pooled_width};
  Plan p{.input = as_layout(input, last),
         .boxes = boxes_for(boxes, input),
         .output = empty_like_layout(input, input.scalar_type(), out, last),
         .argmax = with_argmax ? empty_like_layout(input, code_dtype(shape), out, last)
                               : empty(input, code_dtype(shape), {std::int64_t{0}}),
         .channels_last = last,
         .args = {}};
  p.args = {.input = p.input.const_data_ptr(),
            .boxes = p.boxes.const_data_ptr(),
            .output = p.output.mutable_data_ptr(),
            .argmax = with_argmax ? p.argmax.mutable_data_ptr() : nullptr,
            .shape = shape};
  return p;
}

BackwardPlan plan_backward(const Tensor& grad_output, const Tensor& argmax, const Tensor& boxes,
                           std::int64_t images, std::int64_t height, std::int64_t width,
                           double spatial_scale, bool rounding) {
  check_floating(kOp, "grad_output", grad_output);
  check_dim(kOp, "grad_output", grad_output, 4, "(K, C, pooled_height, pooled_width)");
  check_boxes(grad_output, boxes);
  check_same_device(kOp, "argmax", argmax, "grad_output", grad_output);
  const std::array<std::int64_t, 4> out = {grad_output.size(0), grad_output.size(1),
                                           grad_output.size(2), grad_output.size(3)};
  check_shape(kOp, "argmax", argmax, {out[0], out[1], out[2], out[3]});
  check_shape(kOp, "boxes", boxes, {out[0], 5});
  if (images < 0 || height < 0 || width < 0) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "height", "be at least 0", std::to_string(height));
  }
  const roi_pool::Shape shape =
      plan_shape({images, out[1], height, width}, out[0], out[2], out[3], spatial_scale, rounding);
  if (argmax.scalar_type() != code_dtype(shape)) {
    fail(TORCHKILN_ERROR_TYPE, kOp, "argmax", "be what roi_pool returned for this size",
         text(argmax.scalar_type()));
  }
  const bool last = is_channels_last(argmax);
  BackwardPlan p{.grad_output = as_layout(grad_output, last),
                 .argmax = as_layout(argmax, last),
                 .boxes = boxes_for(boxes, grad_output),
                 .grad_input = empty_like_layout(grad_output, grad_output.scalar_type(),
                                                 {images, out[1], height, width}, last),
                 .channels_last = last,
                 .args = {}};
  p.args = {.grad_output = p.grad_output.const_data_ptr(),
            .argmax = p.argmax.const_data_ptr(),
            .boxes = p.boxes.const_data_ptr(),
            .grad_input = p.grad_input.mutable_data_ptr(),
            .shape = shape};
  return p;
}

// ---- CPU -----------------------------------------------------------------------------------------------------------

// Channels that are searched side by side with channels last.
constexpr std::int64_t kSpan = 64;

template <class Scalar>
void check_images(const Tensor& boxes, const roi_pool::Shape& s) {
  using T = Acc<Scalar>;
  for (std::int64_t i = 0; i < s.rois; ++i) {
    const T image = data<T>(boxes)[5 * i];
    if (image > T(-1) && image < static_cast<T>(s.images)) continue;
    fail(TORCHKILN_ERROR_INDEX, kOp, "boxes",
         "have batch indices below " + std::to_string(s.images), std::to_string(image));
  }
}

// Calls f.operator()<Scalar, kCodeBytes>().
template <class F>
void with_variant(ScalarType dtype, const roi_pool::Shape& s, const F& f) {
  with_float(dtype, [&]<class Scalar>() {
    if (code_bytes_of(s) == 2) {
      f.template operator()<Scalar, 2>();
    } else {
      f.template operator()<Scalar, 4>();
    }
  });
}

// The bin of n <= kSpan channels that lie `step` elements apart, cells `cell` elements apart.
template <class Scalar>
void search(const Scalar* plane, std::int64_t width, std::int64_t cell, std::int64_t n,
            const Range& rows, const Range& columns, Best<Acc<Scalar>>* best) {
  for (std::int64_t c = 0; c < n; ++c)
    best[c] = roi_pool::worst<Acc<Scalar>>(rows.begin, columns.begin);
  for (i32 y = rows.begin; y < rows.end; ++y) {
    for (i32 x = columns.begin; x < columns.end; ++x) {
      const Scalar* at = plane + (y * width + x) * cell;
      for (std::int64_t c = 0; c < n; ++c) best[c].take(load(at[c]), y, x);
    }
  }
}

// One region and the channels [first, first + n): one channel, or up to kSpan with channels last.
template <class Scalar, int kCodeBytes>
void pool_region(const Plan& p, std::int64_t roi, std::int64_t first, std::int64_t n) {
  using T = Acc<Scalar>;
  const roi_pool::Shape& s = p.args.shape;
  const Region<T> region = roi_pool::load_region(static_cast<const T*>(p.args.boxes), roi, s);
  const std::int64_t cells = s.height * s.width, bins = s.pooled_height * s.pooled_width;
  const std::int64_t image = std::max<std::int64_t>(region.image, 0) * s.channels * cells;
  const auto* plane =
      static_cast<const Scalar*>(p.args.input) + image + (p.channels_last ? first : first * cells);
  auto* argmax = static_cast<Code<kCodeBytes>*>(p.args.argmax);
  Best<T> best[kSpan];
  for (std::int64_t bin = 0; bin < bins; ++bin) {
    const Range rows = region.y.bin_of(static_cast<i32>(bin / s.pooled_width));
    const Range columns = region.x.bin_of(static_cast<i32>(bin % s.pooled_width));
    const bool is_empty = region.image < 0 || rows.is_empty() || columns.is_empty();
    if (!is_empty) {
      search(plane, s.width, p.channels_last ? s.channels : 1, n, rows, columns, best);
    }
    const std::int64_t at = p.channels_last ? (roi * bins + bin) * s.channels + first
                                            : (roi * s.channels + first) * bins + bin;
    for (std::int64_t c = 0; c < n; ++c) {
      store(static_cast<Scalar*>(p.args.output)[at + c], is_empty ? T(0) : best[c].value);
      if (argmax == nullptr) continue;
      argmax[at + c] = is_empty ? roi_pool::kNoCell<kCodeBytes>
                                : roi_pool::encode<kCodeBytes>(best[c].y, best[c].x);
    }
  }
}

std::tuple<Tensor, Tensor> cpu(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                               std::int64_t pooled_width, double spatial_scale, bool rounding,
                               bool /*deterministic*/, bool with_argmax) {
  const Plan p =
      plan(input, boxes, pooled_height, pooled_width, spatial_scale, rounding, with_argmax);
  const roi_pool::Shape& s = p.args.shape;
  const std::int64_t span = p.channels_last ? kSpan : 1, groups = ceil_div(s.channels, span);
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
  std::fill(sums.begin(), sums.end(), T(0));
  for (std::int64_t roi = 0; roi < s.rois; ++roi) {
    if (!(boxes[5 * roi] > T(-1)) || static_cast<std::int64_t>(boxes[5 * roi]) != image) continue;
    for (std::int64_t bin = 0; bin < bins; ++bin) {
      const std::int64_t at = p.channels_last ? (roi * bins + bin) * s.channels + first
                                              : (roi * s.channels + first) * bins + bin;
      for (std::int64_t c = 0; c < n; ++c) {
        const u32 code = argmax[at + c];
        if (code == roi_pool::kNoCell<kCodeBytes>) continue;
        const std::int64_t y = code >> (4 * kCodeBytes), x = code & kMask;
        sums[static_cast<std::size_t>((y * s.width + x) * n + c)] += load(grad_output[at + c]);
      }
    }
  }
  auto* grad_input = static_cast<Scalar*>(p.args.grad_input) + image * s.channels * cells;
  for (std::int64_t cell = 0; cell < cells; ++cell) {
    for (std::int64_t c = 0; c < n; ++c) {
      store(grad_input[p.channels_last ? cell * s.channels + first + c : first * cells + cell],
            sums[static_cast<std::size_t>(cell * n + c)]);
    }
  }
}

Tensor backward_cpu(const Tensor& grad_output, const Tensor& argmax, const Tensor& boxes,
                    std::int64_t images, std::int64_t height, std::int64_t width,
                    double spatial_scale, bool rounding, bool /*deterministic*/) {
  const BackwardPlan p =
      plan_backward(grad_output, argmax, boxes, images, height, width, spatial_scale, rounding);
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

// ---- CUDA ----------------------------------------------------------------------------------------------------------

bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;  // null is
}

// 16 bytes of channels, where every cell's begin allows it.
std::int64_t vector_of(const Plan& p) {
  const std::int64_t full =
      full_vector(kernel_type(p.input.scalar_type()), code_bytes_of(p.args.shape));
  const bool fits = p.args.shape.channels % full == 0 && is_aligned(p.args.input) &&
                    is_aligned(p.args.output) && is_aligned(p.args.argmax);
  return fits ? full : 1;
}

std::int64_t index_of(const Tensor& tensor) {
  return tensor.numel() <= kMaxI32 ? TORCHKILN_I32 : TORCHKILN_I64;
}

void launch_forward(const Plan& p) {
  const roi_pool::Shape& s = p.args.shape;
  const std::int64_t scalar = kernel_type(p.input.scalar_type()), index = index_of(p.input);
  const Sizes sizes{s.rois, s.channels, s.height * s.width};
  const std::initializer_list<Buffer> buffers = {
      reads(offsetof(Args, input), p.input), reads(offsetof(Args, boxes), p.boxes),
      writes(offsetof(Args, output), p.output), writes(offsetof(Args, argmax), p.argmax)};
  const CudaPlace place(p.input);
  if (p.channels_last) {
    forward_channels_last_kernel.run(place, {scalar, index, code_bytes_of(s), vector_of(p)}, sizes,
                                     p.args, buffers);
  } else {
    forward_kernel.run(place, {scalar, index, code_bytes_of(s)}, sizes, p.args, buffers);
  }
}

std::tuple<Tensor, Tensor> cuda(const Tensor& input, const Tensor& boxes,
                                std::int64_t pooled_height, std::int64_t pooled_width,
                                double spatial_scale, bool rounding, bool /*deterministic*/,
                                bool with_argmax) {
  const Plan p =
      plan(input, boxes, pooled_height, pooled_width, spatial_scale, rounding, with_argmax);
  if (p.output.numel() > 0) launch_forward(p);
  return {p.output, p.argmax};
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& argmax, const Tensor& boxes,
                     std::int64_t images, std::int64_t height, std::int64_t width,
                     double spatial_scale, bool rounding, bool /*deterministic*/) {
  const BackwardPlan p =
      plan_backward(grad_output, argmax, boxes, images, height, width, spatial_scale, rounding);
  if (p.grad_input.numel() == 0) return p.grad_input;
  const roi_pool::Shape& s = p.args.shape;
  backward_kernel.run(CudaPlace(p.grad_input),
                      {kernel_type(p.grad_input.scalar_type()), index_of(p.grad_input),
                       p.channels_last, code_bytes_of(s)},
                      {s.rois, s.channels, s.height, s.width, s.images}, p.args,
                      {reads(offsetof(BackwardArgs, grad_output), p.grad_output),
                       reads(offsetof(BackwardArgs, argmax), p.argmax),
                       reads(offsetof(BackwardArgs, boxes), p.boxes),
                       writes(offsetof(BackwardArgs, grad_input), p.grad_input)});
  return p.grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "roi_pool(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale=1., bool rounding=True, bool deterministic=False, "
      "bool with_argmax=True) -> (Tensor output, Tensor argmax)");
  m.def(
      "_roi_pool_backward(Tensor grad_output, Tensor argmax, Tensor boxes, SymInt images, "
      "SymInt height, SymInt width, float spatial_scale, bool rounding, bool deterministic) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("roi_pool", TORCH_BOX(&cpu));
  m.impl("_roi_pool_backward", TORCH_BOX(&backward_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("roi_pool", TORCH_BOX(&cuda));
  m.impl("_roi_pool_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace torchkiln::bindings
