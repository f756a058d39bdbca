// Operators that pool bilinear samples: schemas, checks and shapes. (The launches are sampled_roi_cuda.cpp, the loops
// sampled_roi_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/sampled_roi.h"

#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>

#include "bindings/detection/roi_align.h"
#include "bindings/support/any_float.h"
#include "bindings/support/cuda.h"

namespace torchkiln::bindings {
namespace {

using Kind = SampledKind;
using Sizes = std::array<std::int64_t, 4>;

// Bins are numbered with 32 bits, and so are the parts of the work.
constexpr std::int64_t kMostPooled = 4096;
constexpr std::int64_t kMostSamples = 1024;
constexpr std::int64_t kMaxI32 = std::numeric_limits<std::int32_t>::max();

const char* boxes_name(Kind kind) { return kind == Kind::kBezier ? "beziers" : "boxes"; }

void check_range(Kind kind, const char* argument, std::int64_t value, std::int64_t most) {
  check_positive(name_of(kind), argument, value);
  if (value <= most) return;
  fail(TORCHKILN_ERROR_VALUE, name_of(kind), argument, "be at most " + std::to_string(most),
       std::to_string(value));
}

void check_settings(const SampledSettings& s) {
  const char* op = name_of(s.kind);
  if (!(s.spatial_scale > 0 && std::isfinite(s.spatial_scale))) {
    fail(TORCHKILN_ERROR_VALUE, op, "spatial_scale", "be a finite number above 0",
         std::to_string(s.spatial_scale));
  }
  if (s.kind == Kind::kBorder) return check_range(s.kind, "pool_size", s.samples, kMostSamples);
  if (s.kind == Kind::kFeature) {
    if (s.samples == 1 || s.samples == 5) return;
    fail(TORCHKILN_ERROR_VALUE, op, "points", "be 1 or 5", std::to_string(s.samples));
  }
  check_range(s.kind, "pooled_height", s.pooled_height, kMostPooled);
  check_range(s.kind, "pooled_width", s.pooled_width, kMostPooled);
  if (s.samples > kMostSamples) {
    fail(TORCHKILN_ERROR_VALUE, op, "sampling_ratio", "be at most " + std::to_string(kMostSamples),
         std::to_string(s.samples));
  }
}

// Sizes of the maps, and what of them depends on the operator.
void check_maps(const SampledSettings& s, const Sizes& shape) {
  const char* op = name_of(s.kind);
  const auto [n, c, h, w] = shape;
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  // Bins that take turns at blocks of channels number the pixels of them all.
  const std::int64_t maps = s.kind == Kind::kBorder ? std::max<std::int64_t>(1, c) : 1;
  if (h >= kMost || w >= kMost || h * w > kMaxI32 / maps) {
    fail(TORCHKILN_ERROR_VALUE, op, "input", "have fewer than 2^31 pixels a map",
         std::to_string(h) + " x " + std::to_string(w));
  }
  const std::int64_t blocks = s.kind == Kind::kBorder ? sampled_roi::kBorders : s.orientations;
  if (s.kind == Kind::kOriented) check_range(s.kind, "num_orientations", blocks, kMostPooled);
  if (c % blocks == 0) return;
  fail(TORCHKILN_ERROR_VALUE, op, "input",
       "have a number of channels that " + std::to_string(blocks) + " divides", std::to_string(c));
}

void check_boxes(const SampledSettings& s, const Tensor& boxes, const Sizes& shape) {
  const char* op = name_of(s.kind);
  const char* argument = boxes_name(s.kind);
  const auto [n, c, h, w] = shape;
  switch (s.kind) {
    case Kind::kBorder:
      check_floating(op, argument, boxes);
      check_dim(op, argument, boxes, 3, "(N, B, 4)");
      return check_shape(op, argument, boxes, {n, boxes.size(1), 4});
    case Kind::kFeature:
      check_floating(op, argument, boxes);
      return check_shape(op, argument, boxes, {n, h, w, 5});
    default:
      return check_rows(op, argument, boxes, s.kind == Kind::kBezier ? 17 : 6);
  }
}

Sizes output_shape(const SampledSettings& s, const Tensor& boxes, const Sizes& shape) {
  const auto [n, c, h, w] = shape;
  if (s.kind == Kind::kBorder) {
    return {n, c / sampled_roi::kBorders, boxes.size(1), sampled_roi::kBorders};
  }
  if (s.kind == Kind::kFeature) return shape;
  return {boxes.size(0), c, s.pooled_height, s.pooled_width};
}

// Samples of a bin, as far as that is known.
std::int64_t hint_of(const SampledSettings& s) {
  if (s.kind == Kind::kBorder) return s.samples + 1;
  if (s.kind == Kind::kFeature) return s.samples;
  return s.samples > 0 ? s.samples * s.samples : 4;
}

sampled_roi::Args args_of(const SampledSettings& s, const Tensor& boxes, const Sizes& shape) {
  const auto [groups, channels, rows, columns] = output_shape(s, boxes, shape);
  const sampled_roi::Args args = {.boxes = boxes.const_data_ptr(),
                                  .box_type = number_type(boxes.scalar_type()),
                                  .n = shape[0],
                                  .c = shape[1],
                                  .h = shape[2],
                                  .w = shape[3],
                                  .groups = groups,
                                  .bins = rows * columns,
                                  .channels = channels,
                                  .pooled_h = s.pooled_height,
                                  .pooled_w = s.pooled_width,
                                  .samples = s.samples,
                                  .hint = hint_of(s),
                                  .aligned = s.aligned ? 1 : 0,
                                  .clockwise = s.clockwise ? 1 : 0,
                                  .orientations = s.orientations,
                                  .spatial_scale = s.spatial_scale,
                                  .maps = nullptr,
                                  .output = nullptr,
                                  .argmax = nullptr};
  // Blocks of the launches are numbered with 32 bits.
  const std::int64_t part =
      sampled_roi::divided_bins(std::max<std::int64_t>(1, args.bins), args.hint, 64).at_once;
  const std::int64_t parts = ceil_div(args.bins, part) * args.groups;
  if (std::max(args.bins, args.c) <= kMaxI32 &&
      parts <= kMaxI32 / std::max<std::int64_t>(1, ceil_div(args.channels, 32))) {
    return args;
  }
  fail(TORCHKILN_ERROR_VALUE, name_of(s.kind), boxes_name(s.kind),
       "be fewer, so that parts of bins and channels can be counted in 31 bits", text(boxes),
       "Call it for a part of them at a time");
}

template <bool kCuda>
SampledPlan forward(const Tensor& input, const Tensor& boxes, const SampledSettings& settings,
                    bool with_argmax = false) {
  SampledPlan p = plan_sampled(input, boxes, settings, with_argmax);
  if (p.maps.numel() == 0) {  // no pixel, no sample
    torch::stable::zero_(p.output);
    if (with_argmax) torch::stable::fill_(p.argmax, -1);
  }
  if constexpr (!kCuda) {
    run_sampled_cpu(p);
  } else if (p.maps.numel() > 0 && p.output.numel() > 0) {
    run_sampled_cuda(p);
  }
  return p;
}

template <bool kCuda>
Tensor roi_align_rotated(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                         std::int64_t pooled_width, double spatial_scale,
                         std::int64_t sampling_ratio, bool aligned, bool clockwise,
                         bool /*deterministic*/) {
  return forward<kCuda>(input, boxes,
                        {.kind = Kind::kRotated,
                         .pooled_height = pooled_height,
                         .pooled_width = pooled_width,
                         .spatial_scale = spatial_scale,
                         .samples = sampling_ratio,
                         .aligned = aligned,
                         .clockwise = clockwise})
      .output;
}

template <bool kCuda>
Tensor riroi_align_rotated(const Tensor& input, const Tensor& boxes, std::int64_t pooled_height,
                           std::int64_t pooled_width, double spatial_scale,
                           std::int64_t sampling_ratio, std::int64_t num_orientations,
                           bool clockwise, bool /*deterministic*/) {
  return forward<kCuda>(input, boxes,
                        {.kind = Kind::kOriented,
                         .pooled_height = pooled_height,
                         .pooled_width = pooled_width,
                         .spatial_scale = spatial_scale,
                         .samples = sampling_ratio,
                         .clockwise = clockwise,
                         .orientations = num_orientations})
      .output;
}

template <bool kCuda>
Tensor bezier_align(const Tensor& input, const Tensor& beziers, std::int64_t pooled_height,
                    std::int64_t pooled_width, double spatial_scale, std::int64_t sampling_ratio,
                    bool aligned, bool /*deterministic*/) {
  return forward<kCuda>(input, beziers,
                        {.kind = Kind::kBezier,
                         .pooled_height = pooled_height,
                         .pooled_width = pooled_width,
                         .spatial_scale = spatial_scale,
                         .samples = sampling_ratio,
                         .aligned = aligned})
      .output;
}

template <bool kCuda>
std::tuple<Tensor, Tensor> border_align(const Tensor& input, const Tensor& boxes,
                                        std::int64_t pool_size, bool /*deterministic*/,
                                        bool with_argmax) {
  const SampledPlan p =
      forward<kCuda>(input, boxes, {.kind = Kind::kBorder, .samples = pool_size}, with_argmax);
  return {p.output, with_argmax ? p.argmax : empty(p.output, ScalarType::Int, {0})};
}

template <bool kCuda>
Tensor rotated_feature_align(const Tensor& input, const Tensor& boxes, double spatial_scale,
                             std::int64_t points, bool /*deterministic*/) {
  return forward<kCuda>(input, boxes,
                        {.kind = Kind::kFeature, .spatial_scale = spatial_scale, .samples = points})
      .output;
}

template <bool kCuda>
Tensor backward(const Tensor& grad_output, const Tensor& boxes, const std::optional<Tensor>& argmax,
                std::int64_t kind, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w,
                double spatial_scale, std::int64_t samples, bool aligned, bool clockwise,
                std::int64_t orientations, bool channels_last, bool deterministic) {
  check_dim("_sampled_roi_backward", "grad_output", grad_output, 4, "(K, C, height, width)");
  if (kind < 0 || kind > static_cast<std::int64_t>(Kind::kFeature)) {
    fail(TORCHKILN_ERROR_VALUE, "_sampled_roi_backward", "kind", "be 0 to 4", std::to_string(kind));
  }
  SampledPlan p = plan_sampled_backward(grad_output, boxes, argmax, {n, c, h, w},
                                        {.kind = static_cast<Kind>(kind),
                                         .pooled_height = grad_output.size(2),
                                         .pooled_width = grad_output.size(3),
                                         .spatial_scale = spatial_scale,
                                         .samples = samples,
                                         .aligned = aligned,
                                         .clockwise = clockwise,
                                         .orientations = orientations},
                                        channels_last);
  if (n * c * h * w == 0 || p.output.numel() == 0) {
    Tensor maps = empty_layout(grad_output, grad_output.scalar_type(), {n, c, h, w}, channels_last);
    torch::stable::zero_(maps);
    return maps;
  }
  if constexpr (kCuda) return run_sampled_backward_cuda(std::move(p), deterministic);
  return run_sampled_backward_cpu(std::move(p));
}

}  // namespace

const char* name_of(SampledKind kind) {
  switch (kind) {
    case Kind::kRotated:
      return "roi_align_rotated";
    case Kind::kOriented:
      return "riroi_align_rotated";
    case Kind::kBezier:
      return "bezier_align";
    case Kind::kBorder:
      return "border_align";
    default:
      return "rotated_feature_align";
  }
}

SampledPlan plan_sampled(const Tensor& input, const Tensor& boxes, const SampledSettings& settings,
                         bool with_argmax) {
  const char* op = name_of(settings.kind);
  check_floating(op, "input", input);
  check_dim(op, "input", input, 4, "(N, C, H, W)");
  const Sizes shape = {input.size(0), input.size(1), input.size(2), input.size(3)};
  check_settings(settings);
  check_maps(settings, shape);
  check_boxes(settings, boxes, shape);
  check_same_device(op, boxes_name(settings.kind), boxes, "input", input);
  const bool channels_last = is_channels_last(input);
  const Sizes out = output_shape(settings, boxes, shape);
  SampledPlan p{
      .kind = settings.kind,
      .channels_last = channels_last,
      .maps = channels_last ? input : as_contiguous(input),
      .boxes = as_contiguous(boxes),
      .output = empty_layout(input, input.scalar_type(), out, channels_last),
      .argmax = with_argmax ? empty_layout(input, ScalarType::Int, out, channels_last) : Tensor(),
      .args = {}};
  p.args = args_of(settings, p.boxes, shape);
  p.args.maps = const_cast<void*>(p.maps.const_data_ptr());
  p.args.output = p.output.mutable_data_ptr();
  if (with_argmax) p.args.argmax = mutable_data<i32>(p.argmax);
  return p;
}

SampledPlan plan_sampled_backward(const Tensor& grad_output, const Tensor& boxes,
                                  const std::optional<Tensor>& argmax, const Sizes& shape,
                                  const SampledSettings& settings, bool channels_last) {
  const char* op = name_of(settings.kind);
  check_floating(op, "grad_output", grad_output);
  check_settings(settings);
  check_maps(settings, shape);
  check_boxes(settings, boxes, shape);
  check_same_device(op, boxes_name(settings.kind), boxes, "grad_output", grad_output);
  const auto [groups, channels, rows, columns] = output_shape(settings, boxes, shape);
  check_shape(op, "grad_output", grad_output, {groups, channels, rows, columns});
  if (argmax.has_value() != (settings.kind == Kind::kBorder)) {
    fail(TORCHKILN_ERROR_VALUE, op, "argmax", "be given for border_align, and for nothing else",
         argmax.has_value() ? "a tensor" : "None");
  }
  if (argmax.has_value()) {
    check_same_device(op, "argmax", *argmax, "grad_output", grad_output);
    check_shape(op, "argmax", *argmax, {groups, channels, rows, columns});
    if (argmax->scalar_type() != ScalarType::Int) {
      fail(TORCHKILN_ERROR_TYPE, op, "argmax", "be an int32 tensor", text(argmax->scalar_type()));
    }
  }
  SampledPlan p{.kind = settings.kind,
                .channels_last = channels_last,
                .maps = Tensor(),
                .boxes = as_contiguous(boxes),
                .output = grad_output,
                .argmax = argmax.has_value() ? *argmax : Tensor(),
                .args = {}};
  p.args = args_of(settings, p.boxes, shape);
  return p;
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "roi_align_rotated(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale=1.0, int sampling_ratio=0, bool aligned=True, bool clockwise=False, "
      "bool deterministic=False) -> Tensor");
  m.def(
      "riroi_align_rotated(Tensor input, Tensor boxes, int pooled_height, int pooled_width, "
      "float spatial_scale=1.0, int sampling_ratio=0, int num_orientations=8, "
      "bool clockwise=False, bool deterministic=False) -> Tensor");
  m.def(
      "bezier_align(Tensor input, Tensor beziers, int pooled_height, int pooled_width, "
      "float spatial_scale=1.0, int sampling_ratio=0, bool aligned=True, "
      "bool deterministic=False) -> Tensor");
  m.def(
      "border_align(Tensor input, Tensor boxes, int pool_size, bool deterministic=False, "
      "bool with_argmax=True) -> (Tensor, Tensor)");
  m.def(
      "rotated_feature_align(Tensor input, Tensor boxes, float spatial_scale=0.125, int points=1, "
      "bool deterministic=False) -> Tensor");
  m.def(
      "_sampled_roi_backward(Tensor grad_output, Tensor boxes, Tensor? argmax, int kind, int n, "
      "int c, int h, int w, float spatial_scale, int samples, bool aligned, bool clockwise, "
      "int orientations, bool channels_last, bool deterministic) -> Tensor");
}
#define TORCHKILN_SAMPLED_ROI_IMPL(m, kCuda)                                                      \
  m.impl("roi_align_rotated", TORCH_BOX(&torchkiln::bindings::roi_align_rotated<kCuda>));         \
  m.impl("riroi_align_rotated", TORCH_BOX(&torchkiln::bindings::riroi_align_rotated<kCuda>));     \
  m.impl("bezier_align", TORCH_BOX(&torchkiln::bindings::bezier_align<kCuda>));                   \
  m.impl("border_align", TORCH_BOX(&torchkiln::bindings::border_align<kCuda>));                   \
  m.impl("rotated_feature_align", TORCH_BOX(&torchkiln::bindings::rotated_feature_align<kCuda>)); \
  m.impl("_sampled_roi_backward", TORCH_BOX(&torchkiln::bindings::backward<kCuda>))
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) { TORCHKILN_SAMPLED_ROI_IMPL(m, false); }
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) { TORCHKILN_SAMPLED_ROI_IMPL(m, true); }
