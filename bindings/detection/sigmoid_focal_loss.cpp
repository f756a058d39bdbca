// sigmoid_focal_loss for labels and for soft targets: schema, checks and shapes, launches.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/sigmoid_focal_loss.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using sigmoid_focal_loss::Args;
using sigmoid_focal_loss::FinishArgs;
using sigmoid_focal_loss::kMaxBlocks;
using sigmoid_focal_loss::ScaleArgs;

constexpr const char* kOp = "sigmoid_focal_loss";
constexpr std::int64_t kMaxI32 = 2'147'483'647;

struct Statics {
  std::int64_t scalar, index, labels, gamma, output, vector;
};
struct BackwardStatics {
  std::int64_t scalar, index, labels, gamma, vector;
};
struct Sizes {
  std::int64_t numel;
};
struct Tunables {
  std::int64_t block_size, items;
};
struct FinishStatics {
  std::int64_t scalar;
};
struct NoSizes {};
struct BlockSize {
  std::int64_t block_size;
};
struct ScaleStatics {
  std::int64_t scalar, vector;
};

using Forward = Kernel<Args, Statics, Sizes, Tunables>;
using Backward = Kernel<Args, BackwardStatics, Sizes, Tunables>;
using Finish = Kernel<FinishArgs, FinishStatics, NoSizes, BlockSize>;
using Scale = Kernel<ScaleArgs, ScaleStatics, Sizes, BlockSize>;

// Elements in 16 bytes.
std::int64_t full_vector(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 2 : (scalar == TORCHKILN_FLOAT ? 4 : 8);
}
template <class AnyStatics>
bool has_vector(const AnyStatics& s) {
  return s.vector == 1 || s.vector == full_vector(s.scalar);
}

// The grid is a few waves at most: threads walk, so that few partial sums are left. Twice as many or half take the same
// time within 3 %.
constexpr std::int64_t kBlocksPerMultiprocessor = 16;
template <class Problem>
Geometry walk_geometry(const Problem& p, const Tunables& t) {
  const std::int64_t vectors = ceil_div(p.sizes.numel, p.statics.vector);
  const std::int64_t blocks =
      std::min<std::int64_t>({ceil_div(vectors, t.block_size),
                              kBlocksPerMultiprocessor * p.device.multiprocessors, kMaxBlocks});
  return linear(blocks, t.block_size);
}

const std::vector<Parameter> kWalkTunables = {ints("block_size", {128, 256, 512}),
                                              ints("items", {1, 2, 4})};

const Forward forward_kernel({
    .path = "detection/sigmoid_focal_loss.cuh",
    .entry = "forward",
    .operators = {"sigmoid_focal_loss"},
    .statics = {types("scalar", kFloatTypes), types("index", {TORCHKILN_I32, TORCHKILN_I64}),
                bools("labels"), layer_constant("gamma", {2}),
                ints("output", {sigmoid_focal_loss::kElements, sigmoid_focal_loss::kSum}),
                ints("vector", {1, 2, 4, 8})},
    .sizes = {{"numel", TORCHKILN_BUCKET_POW2}},
    .tunables = kWalkTunables,
    .defaults = {{256, 1}},
    .valid = &has_vector<Statics>,
    .geometry = &walk_geometry<Forward::Problem>,
});

const Backward backward_kernel({
    .path = "detection/sigmoid_focal_loss.cuh",
    .entry = "backward",
    .operators = {"sigmoid_focal_loss"},
    .statics = {types("scalar", kFloatTypes), types("index", {TORCHKILN_I32, TORCHKILN_I64}),
                bools("labels"), layer_constant("gamma", {2}), ints("vector", {1, 2, 4, 8})},
    .sizes = {{"numel", TORCHKILN_BUCKET_POW2}},
    .tunables = kWalkTunables,
    .defaults = {{256, 1}},
    .valid = &has_vector<BackwardStatics>,
    .geometry = &walk_geometry<Backward::Problem>,
});

const Finish finish_kernel({
    .path = "detection/sigmoid_focal_loss.cuh",
    .entry = "finish",
    .operators = {"sigmoid_focal_loss"},
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {},
    .tunables = {ints("block_size", {256, 512, 1024})},
    .defaults = {{1024}},
    .geometry = [](const Finish::Problem&, const BlockSize& t) { return linear(1, t.block_size); },
});

const Scale scale_kernel({
    .path = "detection/sigmoid_focal_loss.cuh",
    .entry = "scale",
    .operators = {"sigmoid_focal_loss"},
    .statics = {types("scalar", kFloatTypes), ints("vector", {1, 2, 4, 8})},
    .sizes = {{"numel", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{512}},
    .valid = &has_vector<ScaleStatics>,
    // Two waves: the usual launch has nothing to do and is over the sooner the fewer blocks it has.
    .geometry =
        [](const Scale::Problem& p, const BlockSize& t) {
          const std::int64_t vectors = ceil_div(p.sizes.numel, p.statics.vector);
          const std::int64_t resident = 2 * 2048 / t.block_size * p.device.multiprocessors;
          return linear(std::min(ceil_div(vectors, t.block_size), resident), t.block_size);
        },
});

void check_labels(const Tensor& inputs, const Tensor& targets,
                  const std::optional<Tensor>& weight) {
  check_dim(kOp, "inputs", inputs, 2, "(N, C) when targets are labels");
  check_shape(kOp, "targets", targets, {inputs.size(0)});
  if (!weight) return;
  check_same_dtype(kOp, "weight", *weight, "inputs", inputs);
  check_same_device(kOp, "weight", *weight, "inputs", inputs);
  check_shape(kOp, "weight", *weight, {inputs.size(1)});
}

void check_soft(const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& weight) {
  if (targets.scalar_type() != inputs.scalar_type()) {
    fail(TORCHKILN_ERROR_TYPE, kOp, "targets",
         "be int64 labels or have the dtype of inputs (" + text(inputs.scalar_type()) + ")",
         text(targets.scalar_type()));
  }
  const Shape wanted = shape_of(inputs), got = shape_of(targets);
  if (!std::equal(wanted.begin(), wanted.end(), got.begin(), got.end())) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "targets", "have the shape of inputs " + text(inputs),
         text(targets));
  }
  if (weight) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "weight", "be None unless targets are labels",
         "a tensor of shape " + text(*weight));
  }
}

void check_settings(double alpha, double gamma, std::int64_t reduction) {
  check_not_nan(kOp, "alpha", alpha);
  if (!(gamma >= 0)) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "gamma", "be at least 0", std::to_string(gamma));
  }
  if (reduction < kNone || reduction > kReduceSum) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "reduction", "be 0 (none), 1 (mean) or 2 (sum)",
         std::to_string(reduction));
  }
}

// What forward and backward share.
FocalPlan plan(const Tensor& inputs, const Tensor& targets, const std::optional<Tensor>& weight,
               double alpha, double gamma, std::int64_t reduction) {
  check_floating(kOp, "inputs", inputs);
  check_same_device(kOp, "targets", targets, "inputs", inputs);
  const bool labels = targets.scalar_type() == ScalarType::Long;
  if (labels) {
    check_labels(inputs, targets, weight);
  } else {
    check_soft(inputs, targets, weight);
  }
  check_settings(alpha, gamma, reduction);
  FocalPlan p{.inputs = as_contiguous(inputs),
              .targets = as_contiguous(targets),
              .loss = {},
              .gradient = {},
              .weight = weight ? std::optional(as_contiguous(*weight)) : std::nullopt,
              .grad_output = {},
              .partials = {},
              .labels = labels,
              .args = {}};
  const std::int64_t rows = labels ? inputs.size(0) : 1;
  // As torch's: the mean of nothing is NaN.
  const double count = static_cast<double>(labels ? rows : inputs.numel());
  p.args = {.inputs = p.inputs.const_data_ptr(),
            .targets = p.targets.const_data_ptr(),
            .weight = p.weight ? p.weight->const_data_ptr() : nullptr,
            .grad_output = nullptr,
            .loss = nullptr,
            .gradient = nullptr,
            .partials = nullptr,
            .rows = rows,
            .columns = labels ? inputs.size(1) : inputs.numel(),
            .grad_output_is_one = reduction != kNone,
            .positive = alpha < 0 ? 1.0 : alpha,
            .negative = alpha < 0 ? 1.0 : 1.0 - alpha,
            .gamma = gamma,
            .scale = reduction == kMean ? 1.0 / count : 1.0};
  return p;
}

}  // namespace

FocalPlan plan_focal_forward(const Tensor& inputs, const Tensor& targets,
                             const std::optional<Tensor>& weight, double alpha, double gamma,
                             std::int64_t reduction, bool with_gradient) {
  FocalPlan p = plan(inputs, targets, weight, alpha, gamma, reduction);
  const bool sums = reduction != kNone;
  const Shape shape = shape_of(inputs);
  p.loss = sums ? empty(inputs, p.dtype(), {}) : empty(inputs, p.dtype(), shape);
  p.gradient = sums && with_gradient ? empty(inputs, p.dtype(), shape)
                                     : empty(inputs, p.dtype(), {std::int64_t{0}});
  p.args.loss = p.loss.mutable_data_ptr();
  if (sums && with_gradient) p.args.gradient = p.gradient.mutable_data_ptr();
  return p;
}

FocalPlan plan_focal_backward(const Tensor& grad_output, const Tensor& inputs,
                              const Tensor& targets, const std::optional<Tensor>& weight,
                              double alpha, double gamma, std::int64_t reduction) {
  FocalPlan p = plan(inputs, targets, weight, alpha, gamma, reduction);
  check_same_dtype(kOp, "grad_output", grad_output, "inputs", inputs);
  check_same_device(kOp, "grad_output", grad_output, "inputs", inputs);
  const Shape wanted = reduction == kNone ? shape_of(inputs) : Shape{}, got = shape_of(grad_output);
  if (!std::equal(wanted.begin(), wanted.end(), got.begin(), got.end())) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "grad_output", "have the shape of the loss",
         text(grad_output));
  }
  p.grad_output = as_contiguous(grad_output);
  p.gradient = empty(inputs, p.dtype(), shape_of(inputs));
  p.args.grad_output = p.grad_output->const_data_ptr();
  p.args.gradient = p.gradient.mutable_data_ptr();
  return p;
}

FocalScalePlan plan_focal_scale(const Tensor& gradient, const Tensor& grad_output) {
  check_floating(kOp, "gradient", gradient);
  if (!gradient.is_contiguous()) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "gradient", "be contiguous", "strides of another layout");
  }
  check_same_dtype(kOp, "grad_output", grad_output, "gradient", gradient);
  check_same_device(kOp, "grad_output", grad_output, "gradient", gradient);
  check_shape(kOp, "grad_output", grad_output, {});
  FocalScalePlan p{.gradient = gradient, .grad_output = grad_output, .args = {}};
  p.args = {.gradient = p.gradient.mutable_data_ptr(),
            .grad_output = p.grad_output.const_data_ptr(),
            .numel = p.gradient.numel()};
  return p;
}

namespace {

// ---- CUDA ----------------------------------------------------------------------------------------------------------

bool is_aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;  // null is
}

// 16 bytes where every row and every pointer allows it.
std::int64_t vector_of(const FocalPlan& p) {
  const std::int64_t full = full_vector(kernel_type(p.dtype()));
  const bool fits = p.args.columns % full == 0 && is_aligned(p.args.inputs) &&
                    (p.labels || is_aligned(p.args.targets)) &&
                    (p.args.grad_output_is_one || is_aligned(p.args.grad_output)) &&
                    is_aligned(p.args.gradient) && is_aligned(p.args.loss);
  return fits ? full : 1;
}

BackwardStatics statics_of(const FocalPlan& p) {
  return {.scalar = kernel_type(p.dtype()),
          .index = p.numel() <= kMaxI32 / 2 ? TORCHKILN_I32 : TORCHKILN_I64,
          .labels = p.labels,
          .gamma = p.args.gamma == 2 ? 2 : 0,
          .vector = vector_of(p)};
}

Buffer reads_if(std::size_t offset, const std::optional<Tensor>& tensor) {
  return tensor ? reads(offset, *tensor) : reads(offset, 0);
}

void launch_forward(const CudaPlace& place, const FocalPlan& p, bool sums) {
  const BackwardStatics s = statics_of(p);
  const std::int64_t output = sums ? sigmoid_focal_loss::kSum : sigmoid_focal_loss::kElements;
  const Buffer inputs = reads(offsetof(Args, inputs), p.inputs);
  const Buffer targets = reads(offsetof(Args, targets), p.targets);
  const Buffer weight = reads_if(offsetof(Args, weight), p.weight);
  const Statics statics{s.scalar, s.index, s.labels, s.gamma, output, s.vector};
  if (!sums) {
    forward_kernel.run(place, statics, {p.numel()}, p.args,
                       {inputs, targets, weight, writes(offsetof(Args, loss), p.loss)});
    return;
  }
  forward_kernel.run(
      place, statics, {p.numel()}, p.args,
      {inputs, targets, weight, writes(offsetof(Args, gradient), p.gradient),
       scratch(offsetof(Args, partials), *p.partials), unused(offsetof(Args, loss))});
  const FinishArgs finish{p.args.partials, p.args.loss};
  finish_kernel.run(place, {s.scalar}, {}, finish,
                    {reads(offsetof(FinishArgs, partials), *p.partials),
                     writes(offsetof(FinishArgs, loss), p.loss)});
}

std::tuple<Tensor, Tensor> cuda(const Tensor& inputs, const Tensor& targets,
                                const std::optional<Tensor>& weight, double alpha, double gamma,
                                std::int64_t reduction, bool with_gradient) {
  FocalPlan p = plan_focal_forward(inputs, targets, weight, alpha, gamma, reduction, with_gradient);
  const bool sums = reduction != kNone;
  if (p.numel() == 0) {
    if (sums) torch::stable::fill_(p.loss, empty_focal_loss(p));
    return {p.loss, p.gradient};
  }
  if (sums) {
    const ScalarType dtype =
        p.dtype() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    p.partials = empty(inputs, dtype, {std::int64_t{kMaxBlocks}});
    p.args.partials = p.partials->mutable_data_ptr();
  }
  launch_forward(CudaPlace(p.inputs), p, sums);
  return {p.loss, p.gradient};
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& inputs, const Tensor& targets,
                     const std::optional<Tensor>& weight, double alpha, double gamma,
                     std::int64_t reduction) {
  const FocalPlan p =
      plan_focal_backward(grad_output, inputs, targets, weight, alpha, gamma, reduction);
  if (p.numel() == 0) return p.gradient;
  backward_kernel.run(
      CudaPlace(p.inputs), statics_of(p), {p.numel()}, p.args,
      {reads(offsetof(Args, inputs), p.inputs), reads(offsetof(Args, targets), p.targets),
       reads_if(offsetof(Args, weight), p.weight),
       reads(offsetof(Args, grad_output), *p.grad_output),
       writes(offsetof(Args, gradient), p.gradient)});
  return p.gradient;
}

void scale_cuda(Tensor gradient, const Tensor& grad_output) {
  const FocalScalePlan p = plan_focal_scale(gradient, grad_output);
  if (p.args.numel == 0) return;
  const std::int64_t scalar = kernel_type(p.gradient.scalar_type()), full = full_vector(scalar);
  const bool fits = p.args.numel % full == 0 && is_aligned(p.args.gradient);
  scale_kernel.run(CudaPlace(p.gradient), {scalar, fits ? full : 1}, {p.args.numel}, p.args,
                   {updates(offsetof(ScaleArgs, gradient), p.gradient),
                    reads(offsetof(ScaleArgs, grad_output), p.grad_output)});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "sigmoid_focal_loss(Tensor inputs, Tensor targets, Tensor? weight=None, float alpha=0.25, "
      "float gamma=2., int reduction=0, bool with_gradient=False) -> (Tensor loss, Tensor "
      "gradient)");
  m.def(
      "_sigmoid_focal_loss_backward(Tensor grad_output, Tensor inputs, Tensor targets, "
      "Tensor? weight, float alpha, float gamma, int reduction) -> Tensor");
  m.def("_sigmoid_focal_loss_scale_(Tensor(a!) gradient, Tensor grad_output) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("sigmoid_focal_loss", TORCH_BOX(&cuda));
  m.impl("_sigmoid_focal_loss_backward", TORCH_BOX(&backward_cuda));
  m.impl("_sigmoid_focal_loss_scale_", TORCH_BOX(&scale_cuda));
}

}  // namespace torchkiln::bindings
