// contour_expand and pixel_group: schemas, checks and shapes, launches.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/region_growing.h"

#include <cstddef>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using region_growing::Args;
using region_growing::CountArgs;
using region_growing::MeanArgs;

constexpr const char *kExpand = "contour_expand", *kGroup = "pixel_group";
constexpr std::int64_t kMaxPixels = std::numeric_limits<std::int32_t>::max();
constexpr std::int64_t kMaxLabels = 1 << 24, kMaxChannels = 4 * 65'535;

// ---- kernels ----

struct NoStatics {};
struct GrowStatics {
  std::int64_t scalar, group;
};
struct MeanStatics {
  std::int64_t scalar, out;
};
struct Sizes {
  std::int64_t pixels, labels, channels;
};
struct Tunables {
  std::int64_t block_size;
};

using Count = Kernel<CountArgs, NoStatics, Sizes, Tunables>;
using Seed = Kernel<Args, NoStatics, Sizes, Tunables>;
using Grow = Kernel<Args, GrowStatics, Sizes, Tunables>;
using Means = Kernel<MeanArgs, MeanStatics, Sizes, Tunables>;

constexpr const char* kPath = "detection/region_growing.cuh";
const std::vector<torchkiln_size> kSizes = {{"pixels", TORCHKILN_BUCKET_POW2},
                                            {"labels", TORCHKILN_BUCKET_NONE},
                                            {"channels", TORCHKILN_BUCKET_NONE}};

const Count count_kernel({
    .path = kPath,
    .entry = "count",
    .operators = {kExpand},
    .statics = {},
    .sizes = kSizes,
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{256}},
    .geometry =
        [](const Count::Problem& p, const Tunables& t) {
          return linear(ceil_div(p.sizes.pixels, t.block_size), t.block_size);
        },
});

const Seed seed_kernel({
    .path = kPath,
    .entry = "seed",
    .operators = {kExpand, kGroup},
    .statics = {},
    .sizes = kSizes,
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{256}},
    .geometry =
        [](const Seed::Problem& p, const Tunables& t) {
          return linear(ceil_div(p.sizes.pixels, t.block_size), t.block_size);
        },
});

const Grow grow_kernel({
    .path = kPath,
    .entry = "grow",
    .operators = {kExpand, kGroup},
    .statics = {types("scalar", kFloatTypes), bools("group")},
    .sizes = kSizes,
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{1024}},
    // Without embeddings there is no scalar.
    .valid = [](const GrowStatics& s) { return s.group != 0 || s.scalar == TORCHKILN_FLOAT; },
    .geometry = [](const Grow::Problem&, const Tunables& t) { return linear(1, t.block_size); },
});

const Means means_kernel({
    .path = kPath,
    .entry = "means",
    .operators = {kGroup},
    .statics = {types("scalar", kFloatTypes), types("out", kFloatTypes)},
    .sizes = kSizes,
    .tunables = {ints("block_size", {256, 512, 1024})},
    .defaults = {{1024}},
    .valid = [](const MeanStatics& s) { return s.out == TORCHKILN_DOUBLE || s.out == s.scalar; },
    .geometry =
        [](const Means::Problem& p, const Tunables& t) {
          Geometry g = linear(p.sizes.labels + 1, t.block_size);
          g.grid[1] = static_cast<std::uint32_t>(ceil_div(p.sizes.channels, 4));
          return g;
        },
});

// ---- checks and shapes ----

Sizes sizes_of(const GrowthPlan& p, std::int64_t channels = 1) {
  return {p.pixels(), p.args.num_labels, channels};
}

void check_mask(const char* op, const char* name, const Tensor& mask, const Tensor& labels) {
  if (mask.scalar_type() != ScalarType::Bool && mask.scalar_type() != ScalarType::Byte) {
    fail(TORCHKILN_ERROR_TYPE, op, name, "be a bool or uint8 tensor", text(mask.scalar_type()));
  }
  check_same_device(op, name, mask, "labels", labels);
}

void check_labels(const char* op, const Tensor& labels, std::int64_t num_labels) {
  if (labels.scalar_type() != ScalarType::Int) {
    fail(TORCHKILN_ERROR_TYPE, op, "labels", "be an int32 tensor", text(labels.scalar_type()),
         "Convert it with labels.int()");
  }
  check_dim(op, "labels", labels, 2, "(H, W)");
  if (labels.numel() >= kMaxPixels) {
    fail(TORCHKILN_ERROR_VALUE, op, "labels",
         "have less than " + std::to_string(kMaxPixels) + " pixels",
         std::to_string(labels.numel()));
  }
  if (num_labels < 0 || num_labels > kMaxLabels) {
    fail(TORCHKILN_ERROR_VALUE, op, "num_labels", "be from 0 to " + std::to_string(kMaxLabels),
         std::to_string(num_labels));
  }
  if (!labels.is_cpu()) return;  // elsewhere they count as background
  if (const std::int32_t largest = largest_label(as_contiguous(labels)); largest > num_labels) {
    fail(TORCHKILN_ERROR_INDEX, op, "labels", "be at most " + std::to_string(num_labels),
         std::to_string(largest), "Pass a larger num_labels");
  }
}

// What both operators share; `planes` has one for each round.
GrowthPlan plan(const Tensor& planes, const Tensor& labels, std::int64_t rounds,
                std::int64_t num_labels) {
  GrowthPlan p{.planes = as_contiguous(planes),
               .kernels = as_contiguous(labels),
               .labels = empty(labels, ScalarType::Int, shape_of(labels)),
               .contour = {},
               .scores = {},
               .embeddings = {},
               .means = {},
               .confidence = {},
               .counts = {},
               .args = {}};
  p.args.planes = static_cast<const u8*>(p.planes.const_data_ptr());
  p.args.kernels = data<i32>(p.kernels);
  p.args.labels = mutable_data<i32>(p.labels);
  p.args.rounds = rounds;
  p.args.height = static_cast<i32>(labels.size(0));
  p.args.width = static_cast<i32>(labels.size(1));
  p.args.num_labels = static_cast<i32>(num_labels);
  return p;
}

}  // namespace

GrowthPlan plan_expand(const Tensor& masks, const Tensor& labels, std::int64_t min_area,
                       std::int64_t num_labels) {
  check_labels(kExpand, labels, num_labels);
  check_mask(kExpand, "masks", masks, labels);
  check_dim(kExpand, "masks", masks, 3, "(K, H, W)");
  check_shape(kExpand, "masks", masks, {masks.size(0), labels.size(0), labels.size(1)});
  if (masks.size(0) == 0) {
    fail(TORCHKILN_ERROR_VALUE, kExpand, "masks", "have at least one plane", text(masks));
  }
  GrowthPlan p = plan(masks, labels, masks.size(0) - 1, num_labels);
  p.args.min_area = min_area;
  return p;
}

GrowthPlan plan_group(const Tensor& scores, const Tensor& mask, const Tensor& embeddings,
                      const Tensor& labels, const Tensor& contour, std::int64_t num_labels,
                      double threshold) {
  check_labels(kGroup, labels, num_labels);
  const std::int64_t height = labels.size(0), width = labels.size(1);
  check_floating(kGroup, "scores", scores);
  check_same_device(kGroup, "scores", scores, "labels", labels);
  check_shape(kGroup, "scores", scores, {height, width});
  check_same_dtype(kGroup, "embeddings", embeddings, "scores", scores);
  check_same_device(kGroup, "embeddings", embeddings, "labels", labels);
  check_dim(kGroup, "embeddings", embeddings, 3, "(H, W, C)");
  check_shape(kGroup, "embeddings", embeddings, {height, width, embeddings.size(2)});
  check_not_nan(kGroup, "threshold", threshold);
  if (embeddings.size(2) > kMaxChannels) {
    fail(TORCHKILN_ERROR_VALUE, kGroup, "embeddings",
         "have at most " + std::to_string(kMaxChannels) + " channels",
         std::to_string(embeddings.size(2)));
  }
  for (const auto& [name, tensor] : {std::pair{"mask", &mask}, std::pair{"contour", &contour}}) {
    check_mask(kGroup, name, *tensor, labels);
    check_shape(kGroup, name, *tensor, {height, width});
  }
  GrowthPlan p = plan(mask, labels, 1, num_labels);
  const std::int64_t channels = embeddings.size(2);
  p.contour = as_contiguous(contour);
  p.scores = as_contiguous(scores);
  p.embeddings = as_contiguous(embeddings);
  p.means = empty(labels, ScalarType::Double, {num_labels + 1, channels});
  p.confidence = empty(labels, scores.scalar_type(), {num_labels + 1});
  p.counts = empty(labels, ScalarType::Long, {num_labels + 1});
  p.args.contour = static_cast<const u8*>(p.contour->const_data_ptr());
  p.args.embeddings = p.embeddings->const_data_ptr();
  p.args.means = data<double>(*p.means);
  p.args.channels = static_cast<i32>(channels);
  p.args.threshold = threshold * threshold;
  return p;
}

MeanArgs mean_args(const GrowthPlan& p, const Tensor& labels, const Tensor& values,
                   const Tensor& means, const std::optional<Tensor>& counts,
                   std::int64_t channels) {
  return {.labels = data<i32>(labels),
          .values = values.const_data_ptr(),
          .means = means.mutable_data_ptr(),
          .counts = counts ? mutable_data<i64>(*counts) : nullptr,
          .pixels = p.pixels(),
          .channels = static_cast<i32>(channels)};
}

namespace {

// ---- CUDA ----

Buffer reads_if(std::size_t offset, const std::optional<Tensor>& tensor) {
  return tensor ? reads(offset, *tensor) : reads(offset, 0);
}

// Seeds, then grows. `zeros` holds areas (used if `by_area`) and the number of sources behind them.
void launch_growing(const CudaPlace& place, GrowthPlan& p, const Tensor& zeroed, bool by_area) {
  const ScalarType scalar = p.scores ? p.scores->scalar_type() : ScalarType::Float;
  const std::int64_t pixels = p.pixels(), list_bytes = 2 * pixels * 4;
  const std::int64_t area_bytes = (p.args.num_labels + std::int64_t{1}) * 4;
  const Tensor scratch_space = empty(p.kernels, ScalarType::Int, {3 * pixels});
  p.args.claims = mutable_data<i32>(scratch_space);
  p.args.lists = p.args.claims + pixels;
  p.args.count = mutable_data<i32>(zeroed) + p.args.num_labels + 1;
  if (by_area) p.args.areas = data<i32>(zeroed);
  const Buffer kernels = reads(offsetof(Args, kernels), p.kernels);
  const Buffer contour = reads_if(offsetof(Args, contour), p.contour);
  const Buffer areas = reads(offsetof(Args, areas), by_area ? area_bytes : 0);
  // The list has no order of its own, so another launch makes another one of the same pixels.
  const Buffer lists =
      buffer(offsetof(Args, lists), TORCHKILN_READ_WRITE, list_bytes, TORCHKILN_SCRATCH);
  const Buffer claims =
      buffer(offsetof(Args, claims), TORCHKILN_READ_WRITE, pixels * 4, TORCHKILN_SCRATCH);
  seed_kernel.run(place, {}, sizes_of(p), p.args,
                  {kernels, contour, areas, writes(offsetof(Args, labels), p.labels), claims, lists,
                   updates(offsetof(Args, count), std::int64_t{4}), unused(offsetof(Args, planes)),
                   unused(offsetof(Args, embeddings)), unused(offsetof(Args, means))});
  if (p.args.rounds == 0) return;
  grow_kernel.run(
      place, {kernel_type(scalar), p.embeddings.has_value()}, sizes_of(p), p.args,
      {kernels, contour, areas, reads(offsetof(Args, planes), p.planes),
       reads_if(offsetof(Args, embeddings), p.embeddings), reads_if(offsetof(Args, means), p.means),
       updates(offsetof(Args, labels), p.labels), claims, lists,
       reads(offsetof(Args, count), std::int64_t{4})});
}

void launch_means(const CudaPlace& place, const GrowthPlan& p, const Tensor& labels,
                  const Tensor& values, const Tensor& means, const std::optional<Tensor>& counts,
                  std::int64_t channels) {
  means_kernel.run(
      place, {kernel_type(values.scalar_type()), kernel_type(means.scalar_type())},
      sizes_of(p, channels), mean_args(p, labels, values, means, counts, channels),
      {reads(offsetof(MeanArgs, labels), labels), reads(offsetof(MeanArgs, values), values),
       writes(offsetof(MeanArgs, means), means),
       counts ? writes(offsetof(MeanArgs, counts), *counts) : unused(offsetof(MeanArgs, counts))});
}

Tensor expand_cuda(const Tensor& masks, const Tensor& labels, std::int64_t min_area,
                   std::int64_t num_labels) {
  GrowthPlan p = plan_expand(masks, labels, min_area, num_labels);
  if (p.pixels() == 0) return p.labels;
  const CudaPlace place(p.labels);
  const Tensor zeroed = zeros(labels, ScalarType::Int, {num_labels + 2});
  const CountArgs args = {p.args.kernels, mutable_data<i32>(zeroed), p.pixels(), p.args.num_labels};
  count_kernel.run(place, {}, sizes_of(p), args,
                   {reads(offsetof(CountArgs, kernels), p.kernels),
                    updates(offsetof(CountArgs, areas), zeroed)});
  launch_growing(place, p, zeroed, true);
  return p.labels;
}

std::tuple<Tensor, Tensor, Tensor> group_cuda(const Tensor& scores, const Tensor& mask,
                                              const Tensor& embeddings, const Tensor& labels,
                                              const Tensor& contour, std::int64_t num_labels,
                                              double threshold) {
  GrowthPlan p = plan_group(scores, mask, embeddings, labels, contour, num_labels, threshold);
  const CudaPlace place(p.labels);
  if (p.args.channels > 0) {
    launch_means(place, p, p.kernels, *p.embeddings, *p.means, {}, p.args.channels);
  }
  if (p.pixels() > 0) {
    launch_growing(place, p, zeros(labels, ScalarType::Int, {num_labels + 2}), false);
  }
  launch_means(place, p, p.labels, *p.scores, *p.confidence, p.counts, 1);
  return {p.labels, *p.confidence, *p.counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def("contour_expand(Tensor masks, Tensor labels, int min_area, int num_labels) -> Tensor");
  m.def(
      "pixel_group(Tensor scores, Tensor mask, Tensor embeddings, Tensor labels, Tensor contour, "
      "int num_labels, float threshold) -> (Tensor groups, Tensor confidence, Tensor counts)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("contour_expand", TORCH_BOX(&expand_cuda));
  m.impl("pixel_group", TORCH_BOX(&group_cuda));
}

}  // namespace torchkiln::bindings
