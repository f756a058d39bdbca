// deformable_aggregation: schema, checks and shapes. (The launches are deformable_aggregation_cuda.cpp, the loops
// deformable_aggregation_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/deformable/deformable_aggregation.h"

#include <algorithm>
#include <array>
#include <limits>
#include <tuple>
#include <utility>

namespace torchkiln::bindings {
namespace {

using deformable_aggregation::Args;

constexpr const char* kOp = "deformable_aggregation";
constexpr std::int64_t kMaxI32 = std::numeric_limits<std::int32_t>::max();

[[noreturn]] void refuse(const char* argument, const std::string& rule, const std::string& got,
                         const std::string& way_out = "") {
  fail(TORCHKILN_ERROR_VALUE, kOp, argument, rule, got, way_out);
}

// ---- layouts of levels: (bs, M, C, h, w) ----

using LevelShape = std::array<std::int64_t, 5>;

LevelShape level_shape(const Tensor& level) {
  return {level.size(0), level.size(1), level.size(2), level.size(3), level.size(4)};
}

LevelShape last_strides(const LevelShape& shape) {
  const auto [n, m, c, h, w] = shape;
  return {m * h * w * c, h * w * c, 1, w * c, c};
}

// Are channels neighbours, rows of them after each other? Sizes of one do not count.
bool is_by_rows(const Tensor& level) {
  const LevelShape strides = last_strides(level_shape(level));
  for (std::size_t dim = 0; dim < 5; ++dim) {
    const auto d = static_cast<std::int64_t>(dim);
    if (level.size(d) != 1 && level.stride(d) != strides[dim]) return false;
  }
  return true;
}

Tensor empty_by_rows(const Tensor& like, const LevelShape& shape) {
  return empty_strided(like, like.scalar_type(), Shape(shape), Shape(last_strides(shape)));
}

Tensor by_rows(const Tensor& level) {
  if (level.dim() != 5) return as_contiguous(level);
  if (is_by_rows(level)) return level;
  Tensor copy = empty_by_rows(level, level_shape(level));
  torch::stable::copy_(copy, level);
  return copy;
}

// ---- checks ----

void check_indices(const AggregationInputs& in, std::int64_t cameras, std::int64_t levels) {
  for (const auto& [name, tensor] :
       {std::pair{"spatial_shape", &*in.shapes}, std::pair{"scale_start_index", &*in.starts}}) {
    const ScalarType dtype = tensor->scalar_type();
    if (dtype != ScalarType::Int && dtype != ScalarType::Long) {
      fail(TORCHKILN_ERROR_TYPE, kOp, name, "be an int32 or int64 tensor", text(dtype));
    }
    check_same_device(kOp, name, *tensor, "feature_maps", in.maps.front());
  }
  check_shape(kOp, "spatial_shape", *in.shapes, {cameras, levels, 2});
  check_shape(kOp, "scale_start_index", *in.starts, {cameras, levels});
  check_same_dtype(kOp, "scale_start_index", *in.starts, "spatial_shape", *in.shapes);
}

void check_maps(const AggregationInputs& in) {
  const bool in_one = in.shapes.has_value();
  const auto count = static_cast<std::int64_t>(in.maps.size());
  if (count < 1 || count > deformable_aggregation::kMostMaps) {
    refuse("feature_maps", "have 1 to 8 levels", std::to_string(count));
  }
  const Tensor& first = in.maps.front();
  for (const Tensor& map : in.maps) {
    check_floating(kOp, "feature_maps", map);
    check_dim(kOp, "feature_maps", map, in_one ? 3 : 5,
              in_one ? "(bs, N, C)" : "(bs, M, C, H, W) on each level");
    check_same_device(kOp, "feature_maps", map, "the first", first);
    check_same_dtype(kOp, "feature_maps", map, "the first", first);
    const bool alike = in_one || (map.size(0) == first.size(0) && map.size(1) == first.size(1) &&
                                  map.size(2) == first.size(2));
    if (!alike) {
      refuse("feature_maps",
             "have the same images, cameras and channels on all levels; the first has shape " +
                 text(first),
             text(map));
    }
    const std::int64_t c = map.size(2);
    if (c > deformable_aggregation::kMostChannels) {
      refuse("feature_maps", "have at most 2048 channels", std::to_string(c));
    }
    // Rows of channels are numbered with 31 bits.
    if (map.numel() / std::max<std::int64_t>(1, c) > kMaxI32) {
      refuse("feature_maps", "have fewer than 2^31 pixels", text(map));
    }
  }
}

void check_weights(const AggregationInputs& in, std::int64_t levels, bool camera_first) {
  const Tensor& map = in.maps.front();
  check_floating(kOp, "weights", in.weights);
  check_dim(kOp, "weights", in.weights, 6,
            camera_first ? "(bs, Q, M, L, P, G)" : "(bs, Q, P, M, L, G)");
  check_same_device(kOp, "weights", in.weights, "feature_maps", map);
  const ScalarType own = map.scalar_type(), dtype = in.weights.scalar_type();
  if (dtype != own && dtype != sum_type(own)) {
    fail(TORCHKILN_ERROR_TYPE, kOp, "weights",
         "have the dtype of feature_maps (" + text(own) + ") or " + text(sum_type(own)),
         text(dtype));
  }
  const Tensor& at = in.locations;
  const std::int64_t n = at.size(0), q = at.size(1), p = at.size(2), m = at.size(3);
  const std::int64_t g = in.weights.size(5), c = map.size(2);
  if (camera_first) {
    check_shape(kOp, "weights", in.weights, {n, q, m, levels, p, g});
  } else {
    check_shape(kOp, "weights", in.weights, {n, q, p, m, levels, g});
  }
  if (g < 1 || c % g != 0) {
    refuse("weights", "have a number of groups that divides the " + std::to_string(c) + " channels",
           std::to_string(g));
  }
}

// `levels` and the cameras of the maps are right already.
void check_samples(const AggregationInputs& in, std::int64_t cameras) {
  check_floating(kOp, "sampling_location", in.locations);
  check_dim(kOp, "sampling_location", in.locations, 5, "(bs, Q, P, M, 2)");
  const Tensor& map = in.maps.front();
  check_same_device(kOp, "sampling_location", in.locations, "feature_maps", map);
  check_shape(kOp, "sampling_location", in.locations,
              {map.size(0), in.locations.size(1), in.locations.size(2), cameras, 2});
}

// Numbers of blocks have 31 bits, places inside of a query or image one to spare.
void check_counts(const Args& a) {
  constexpr std::int64_t kMost = std::int64_t{1} << 30;
  const std::int64_t in_query = a.points * a.cameras * a.levels * a.groups;
  if (in_query >= kMost || a.queries * a.points >= kMost) {
    refuse("weights", "have fewer than 2^30 numbers a query, and points an image",
           std::to_string(std::max<std::int64_t>(in_query, a.queries * a.points)));
  }
  const std::int64_t pairs = a.points * a.cameras;
  const std::int64_t parts =
      std::max<std::int64_t>((a.channels + 31) / 32 * parts_of(a), (pairs + 63) / 64);
  if (a.batch * a.queries > kMaxI32 / std::max<std::int64_t>(1, parts)) {
    refuse("sampling_location", "have fewer queries, so that blocks can be counted in 31 bits",
           std::to_string(a.batch * a.queries), "Call it for a part of them at a time");
  }
}

// ---- plan ----

void set_sizes(AggregationPlan& p, const AggregationInputs& in, std::int64_t cameras,
               std::int64_t levels, bool camera_first) {
  Args& a = p.args;
  const Tensor& map = in.maps.front();
  a.batch = map.size(0);
  a.channels = map.size(2);
  a.rows = p.one_by_one ? 0 : map.size(1);
  a.queries = in.locations.size(1);
  a.points = in.locations.size(2);
  a.cameras = cameras;
  a.levels = levels;
  a.groups = in.weights.size(5);
  a.point_stride = camera_first ? a.groups : cameras * levels * a.groups;
  a.level_stride = camera_first ? a.points * a.groups : a.groups;
  a.camera_stride = levels * a.level_stride;
  // Parts of nearly equal lengths, by the sizes alone: the same bits on every GPU.
  const std::int64_t pairs = std::max<std::int64_t>(1, a.points * a.cameras);
  constexpr std::int64_t kMost = deformable_aggregation::kPairsOfPart;
  const std::int64_t parts = (pairs + kMost - 1) / kMost;
  a.part = (pairs + parts - 1) / parts;
  using deformable_aggregation::Divisor;
  a.maps_of_image = Divisor(std::max<std::int64_t>(1, cameras * levels));
  a.points_of_query = Divisor(std::max<std::int64_t>(1, a.points));
  for (std::size_t i = 0; p.one_by_one && i < in.maps.size(); ++i) {
    a.h[i] = static_cast<i32>(in.maps[i].size(3));
    a.w[i] = static_cast<i32>(in.maps[i].size(4));
  }
}

void set_pointers(AggregationPlan& p) {
  Args& a = p.args;
  for (std::size_t i = 0; i < p.maps.size(); ++i) a.maps[i] = p.maps[i].const_data_ptr();
  if (!p.one_by_one) {
    a.shapes = p.shapes.const_data_ptr();
    a.starts = p.starts.const_data_ptr();
    a.wide_indices = p.shapes.scalar_type() == ScalarType::Long;
  }
  a.locations = p.locations.const_data_ptr();
  a.location_type = number_type(p.locations.scalar_type());
  a.weights = p.weights.const_data_ptr();
  if (p.normalizer.defined()) a.normalizer = p.normalizer.mutable_data_ptr();
  a.output = const_cast<void*>(p.output.const_data_ptr());
  a.output_type = number_type(p.output.scalar_type());
}

// All but the output and the normalizer.
AggregationPlan plan_inputs(const AggregationInputs& in, bool camera_first) {
  check_maps(in);
  const Tensor& first = in.maps.front();
  AggregationPlan p{};
  p.one_by_one = !in.shapes.has_value();
  check_dim(kOp, "sampling_location", in.locations, 5, "(bs, Q, P, M, 2)");
  const std::int64_t cameras = p.one_by_one ? first.size(1) : in.locations.size(3);
  if (!p.one_by_one) check_dim(kOp, "spatial_shape", *in.shapes, 3, "(M, L, 2)");
  const std::int64_t levels =
      p.one_by_one ? static_cast<std::int64_t>(in.maps.size()) : in.shapes->size(1);
  if (levels > deformable_aggregation::kMostLevels) {
    refuse("spatial_shape", "have at most 32 levels", std::to_string(levels));
  }
  check_samples(in, cameras);
  if (!p.one_by_one) check_indices(in, cameras, levels);
  check_weights(in, levels, camera_first);
  set_sizes(p, in, cameras, levels, camera_first);
  check_counts(p.args);
  std::int64_t pixels = 0;
  for (const Tensor& map : in.maps) pixels += map.numel();
  p.is_empty = in.weights.numel() == 0 || pixels == 0;
  for (const Tensor& map : in.maps) p.maps.push_back(by_rows(map));
  if (!p.one_by_one) {
    p.shapes = as_contiguous(*in.shapes);
    p.starts = as_contiguous(*in.starts);
  }
  p.locations = as_contiguous(in.locations);
  p.weights = as_contiguous(in.weights);
  return p;
}

// ---- operators ----

// How a call is to be computed, as in the schemas.
struct Options {
  bool camera_first, softmax;
};

template <bool kCuda>
std::tuple<Tensor, Tensor> forward(const AggregationInputs& in, const Options& options,
                                   bool wide_output) {
  const AggregationPlan p =
      plan_aggregation(in, options.camera_first, options.softmax, wide_output);
  if (p.is_empty) {
    torch::stable::zero_(const_cast<Tensor&>(p.output));
    if (options.softmax) torch::stable::zero_(const_cast<Tensor&>(p.normalizer));
  } else if constexpr (kCuda) {
    run_aggregation_cuda(p);
  } else {
    run_aggregation_cpu(p);
  }
  const ScalarType sums = sum_type(in.maps.front().scalar_type());
  return {p.output, options.softmax ? p.normalizer : empty(p.output, sums, {0})};
}

template <bool kCuda>
std::tuple<Tensor, Tensor> aggregate(const Tensor& feature_maps, const Tensor& sampling_location,
                                     const Tensor& weights, const Tensor& spatial_shape,
                                     const Tensor& scale_start_index, bool camera_first,
                                     bool softmax, bool wide_output, bool /*deterministic*/) {
  return forward<kCuda>(
      {{feature_maps}, spatial_shape, scale_start_index, sampling_location, weights},
      {camera_first, softmax}, wide_output);
}

template <bool kCuda>
std::tuple<Tensor, Tensor> aggregate_levels(std::vector<Tensor> feature_maps,
                                            const Tensor& sampling_location, const Tensor& weights,
                                            bool camera_first, bool softmax, bool wide_output,
                                            bool /*deterministic*/) {
  return forward<kCuda>(
      {std::move(feature_maps), std::nullopt, std::nullopt, sampling_location, weights},
      {camera_first, softmax}, wide_output);
}

std::vector<Tensor> in_layouts(const std::vector<Tensor>& maps,
                               const std::vector<Tensor>& gradients) {
  std::vector<Tensor> result;
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    const bool own = maps[i].dim() != 5 || (!maps[i].is_contiguous() && is_by_rows(maps[i])) ||
                     gradients[i].is_contiguous();
    if (own) {
      result.push_back(gradients[i]);
      continue;
    }
    Tensor copy = empty(maps[i], maps[i].scalar_type(), shape_of(maps[i]));
    torch::stable::copy_(copy, gradients[i]);
    result.push_back(copy);
  }
  return result;
}

AggregationGradient plan_backward(const Tensor& grad_output, const AggregationInputs& in,
                                  const Tensor& output, const Tensor& normalizer,
                                  const Options& options, bool maps_wanted) {
  AggregationGradient g{
      .plan = plan_inputs(in, options.camera_first),
      .grad_output = {},
      .gradients = {},
      .grad_locations = empty(in.locations, in.locations.scalar_type(), shape_of(in.locations)),
      .grad_weights = empty(in.weights, in.weights.scalar_type(), shape_of(in.weights))};
  const Args& a = g.plan.args;
  check_floating(kOp, "grad_output", grad_output);
  check_same_device(kOp, "grad_output", grad_output, "feature_maps", in.maps.front());
  check_shape(kOp, "grad_output", grad_output, {a.batch, a.queries, a.channels});
  check_shape(kOp, "output", output, {a.batch, a.queries, a.channels});
  g.grad_output = as_contiguous(grad_output);
  g.plan.output = as_contiguous(output);
  if (options.softmax) {
    check_shape(kOp, "normalizer", normalizer, {a.batch, a.queries, 2, a.groups});
    const ScalarType sums = sum_type(in.maps.front().scalar_type());
    if (normalizer.scalar_type() != sums) {
      fail(TORCHKILN_ERROR_TYPE, kOp, "normalizer", "be " + text(sums),
           text(normalizer.scalar_type()));
    }
    g.plan.normalizer = as_contiguous(normalizer);
  }
  set_pointers(g.plan);
  for (std::size_t i = 0; maps_wanted && i < in.maps.size(); ++i) {
    const Tensor& map = in.maps[i];
    g.gradients.push_back(map.dim() == 5 ? empty_by_rows(map, level_shape(map))
                                         : empty(map, map.scalar_type(), shape_of(map)));
    g.plan.args.gradients[i] = g.gradients[i].mutable_data_ptr();
  }
  Args& args = g.plan.args;
  args.grad_output = g.grad_output.const_data_ptr();
  args.gradient_type = number_type(grad_output.scalar_type());
  args.grad_locations = g.grad_locations.mutable_data_ptr();
  args.grad_weights = g.grad_weights.mutable_data_ptr();
  return g;
}

template <bool kCuda>
AggregationGradient differentiate(const Tensor& grad_output, const AggregationInputs& in,
                                  const Tensor& output, const Tensor& normalizer,
                                  const Options& options, bool deterministic, bool maps_wanted) {
  AggregationGradient g = plan_backward(grad_output, in, output, normalizer, options, maps_wanted);
  if (g.plan.is_empty) {
    for (Tensor& gradient : g.gradients) torch::stable::zero_(gradient);
    torch::stable::zero_(g.grad_locations);
    torch::stable::zero_(g.grad_weights);
  } else if constexpr (kCuda) {
    run_aggregation_backward_cuda(g, deterministic);
  } else {
    run_aggregation_backward_cpu(g);
  }
  return g;
}

template <bool kCuda>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& feature_maps,
                                            const Tensor& sampling_location, const Tensor& weights,
                                            const Tensor& spatial_shape,
                                            const Tensor& scale_start_index, const Tensor& output,
                                            const Tensor& normalizer, bool camera_first,
                                            bool softmax, bool deterministic, bool maps_wanted) {
  const AggregationGradient g = differentiate<kCuda>(
      grad_output, {{feature_maps}, spatial_shape, scale_start_index, sampling_location, weights},
      output, normalizer, {camera_first, softmax}, deterministic, maps_wanted);
  const Tensor maps =
      maps_wanted ? g.gradients.front() : empty(feature_maps, feature_maps.scalar_type(), {0});
  return {maps, g.grad_locations, g.grad_weights};
}

template <bool kCuda>
std::vector<Tensor> backward_levels(const Tensor& grad_output, std::vector<Tensor> feature_maps,
                                    const Tensor& sampling_location, const Tensor& weights,
                                    const Tensor& output, const Tensor& normalizer,
                                    bool camera_first, bool softmax, bool deterministic,
                                    bool maps_wanted) {
  const AggregationGradient g = differentiate<kCuda>(
      grad_output, {feature_maps, std::nullopt, std::nullopt, sampling_location, weights}, output,
      normalizer, {camera_first, softmax}, deterministic, maps_wanted);
  std::vector<Tensor> result = in_layouts(feature_maps, g.gradients);
  result.push_back(g.grad_locations);
  result.push_back(g.grad_weights);
  return result;
}

}  // namespace

AggregationPlan plan_aggregation(const AggregationInputs& inputs, bool camera_first, bool softmax,
                                 bool wide_output) {
  AggregationPlan p = plan_inputs(inputs, camera_first);
  const Args& a = p.args;
  const Tensor& first = inputs.maps.front();
  const ScalarType own = first.scalar_type();
  p.output = empty(first, wide_output ? sum_type(own) : own, {a.batch, a.queries, a.channels});
  if (softmax) p.normalizer = empty(first, sum_type(own), {a.batch, a.queries, 2, a.groups});
  set_pointers(p);
  return p;
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "deformable_aggregation(Tensor feature_maps, Tensor sampling_location, Tensor weights, "
      "Tensor spatial_shape, Tensor scale_start_index, bool camera_first=False, "
      "bool softmax=False, bool wide_output=False, bool deterministic=False) -> (Tensor, Tensor)");
  m.def(
      "_deformable_aggregation_backward(Tensor grad_output, Tensor feature_maps, "
      "Tensor sampling_location, Tensor weights, Tensor spatial_shape, Tensor scale_start_index, "
      "Tensor output, Tensor normalizer, bool camera_first, bool softmax, bool deterministic, "
      "bool maps_wanted) -> (Tensor, Tensor, Tensor)");
  // Lists of tensors cost autograd ten times as much as tensors.
  m.def(
      "_deformable_aggregation_levels(Tensor[] feature_maps, Tensor sampling_location, "
      "Tensor weights, bool camera_first, bool softmax, bool wide_output, bool deterministic) -> "
      "(Tensor, Tensor)");
  m.def(
      "_deformable_aggregation_levels_backward(Tensor grad_output, Tensor[] feature_maps, "
      "Tensor sampling_location, Tensor weights, Tensor output, Tensor normalizer, "
      "bool camera_first, bool softmax, bool deterministic, bool maps_wanted) -> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  using namespace torchkiln::bindings;  // NOLINT: their names are those of the schemas
  m.impl("deformable_aggregation", TORCH_BOX(&aggregate<false>));
  m.impl("_deformable_aggregation_backward", TORCH_BOX(&backward<false>));
  m.impl("_deformable_aggregation_levels", TORCH_BOX(&aggregate_levels<false>));
  m.impl("_deformable_aggregation_levels_backward", TORCH_BOX(&backward_levels<false>));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  using namespace torchkiln::bindings;  // NOLINT: their names are those of the schemas
  m.impl("deformable_aggregation", TORCH_BOX(&aggregate<true>));
  m.impl("_deformable_aggregation_backward", TORCH_BOX(&backward<true>));
  m.impl("_deformable_aggregation_levels", TORCH_BOX(&aggregate_levels<true>));
  m.impl("_deformable_aggregation_levels_backward", TORCH_BOX(&backward_levels<true>));
}
