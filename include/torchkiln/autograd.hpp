// The differentiable operators for C++ programs, with their gradients. In Python the torchkiln package registers them;
// here each is a torch::autograd::Function over the same two raw operators. Header only: compiled by the user against
// full libtorch, with libtorchkiln_ops in the process. Arguments and defaults are those of the schemas.
//
//   torch::Tensor pooled = torchkiln::autograd::roi_align(features, boxes, 7, 7, 0.25);
//   pooled.sum().backward();
//
// Operators without a gradient are called through torch's dispatcher (docs/cpp.md).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace torchkiln::autograd {

enum class Pooling : std::int64_t { kAverage = 0, kMaximum = 1 };
enum class IouKind : std::int64_t {
  kPlain = 0,
  kGeneralized = 1,
  kDistance = 2,
  kComplete = 3,
  kOfFirst = 4  // intersection over the first box's area
};
enum class Reduction : std::int64_t { kNone = 0, kMean = 1, kSum = 2 };

namespace detail {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  const auto schema = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(schema.has_value(), name,
              ": the operators of torchkiln must be in the process. Link torchkiln::torchkiln_ops, "
              "or dlopen libtorchkiln_ops");
  return schema->template typed<Signature>();
}

// A gradient computed below autograd has no gradient of its own: asking for one must not give zeros.
inline void refuse_second_derivative(const char* name, bool wanted) {
  TORCH_CHECK(!wanted, name,
              ": second derivatives are not implemented. Call backward() without create_graph");
}

// Whether this backward is itself recorded, and `tensor` takes part in it.
inline bool is_recorded(const Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad();
}

inline bool is_channels_last(const Tensor& tensor) {
  return !tensor.is_contiguous() && tensor.is_contiguous(at::MemoryFormat::ChannelsLast);
}

struct BoxIou : torch::autograd::Function<BoxIou> {
  static Tensor forward(AutogradContext* ctx, const Tensor& boxes1, const Tensor& boxes2,
                        std::int64_t mode, double eps, bool aligned, double offset) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, std::int64_t, double, bool, double)>(
            "torchkiln::box_iou");
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({boxes1, boxes2});
    ctx->saved_data["mode"] = mode;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["aligned"] = aligned;
    ctx->saved_data["offset"] = offset;
    return op.call(boxes1, boxes2, mode, eps, aligned, offset);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, std::int64_t,
                                        double, bool, double)>("torchkiln::_box_iou_backward");
    refuse_second_derivative("box_iou", at::GradMode::is_enabled());
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    auto [grad1, grad2] =
        op.call(grads[0], saved[0], saved[1], ctx->saved_data["mode"].toInt(),
                ctx->saved_data["eps"].toDouble(), ctx->saved_data["aligned"].toBool(),
                ctx->saved_data["offset"].toDouble());
    return {grad1, grad2, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct RoiAlign : torch::autograd::Function<RoiAlign> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& boxes,
                        std::int64_t pooled_height, std::int64_t pooled_width, double spatial_scale,
                        std::int64_t sampling_ratio, bool aligned, std::int64_t pooling) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, std::int64_t, std::int64_t, double, std::int64_t,
                    bool, std::int64_t)>("torchkiln::roi_align");
    const at::AutoDispatchBelowADInplaceOrView guard;
    // The winners of a maximum are found again, from an input that lives longer than this anyway.
    const bool maximum = pooling == static_cast<std::int64_t>(Pooling::kMaximum);
    ctx->save_for_backward({boxes, maximum ? input : Tensor()});
    ctx->saved_data["shape"] = input.sizes().vec();
    ctx->saved_data["pooled"] = std::vector<std::int64_t>{pooled_height, pooled_width};
    ctx->saved_data["spatial_scale"] = spatial_scale;
    ctx->saved_data["sampling_ratio"] = sampling_ratio;
    ctx->saved_data["aligned"] = aligned;
    ctx->saved_data["channels_last"] = is_channels_last(input);
    return op.call(input, boxes, pooled_height, pooled_width, spatial_scale, sampling_ratio,
                   aligned, pooling);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, std::int64_t,
                    std::int64_t, std::int64_t, std::int64_t, double, std::int64_t, bool, bool)>(
            "torchkiln::_roi_align_backward");
    const auto saved = ctx->get_saved_variables();
    refuse_second_derivative(
        "roi_align", is_recorded(grads[0]) || (saved[1].defined() && is_recorded(saved[1])));
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto shape = ctx->saved_data["shape"].toIntVector();
    const Tensor grad =
        op.call(grads[0], saved[0], winners(ctx, saved[1], saved[0]), shape[0], shape[1], shape[2],
                shape[3], ctx->saved_data["spatial_scale"].toDouble(),
                ctx->saved_data["sampling_ratio"].toInt(), ctx->saved_data["aligned"].toBool(),
                ctx->saved_data["channels_last"].toBool());
    return {grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }

 private:
  static std::optional<Tensor> winners(AutogradContext* ctx, const Tensor& input,
                                       const Tensor& boxes) {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, std::int64_t, std::int64_t,
                                        double, std::int64_t, bool)>("torchkiln::_roi_align_max");
    if (!input.defined()) return std::nullopt;
    const auto pooled = ctx->saved_data["pooled"].toIntVector();
    return std::get<1>(
        op.call(input, boxes, pooled[0], pooled[1], ctx->saved_data["spatial_scale"].toDouble(),
                ctx->saved_data["sampling_ratio"].toInt(), ctx->saved_data["aligned"].toBool()));
  }
};

struct RoiPool : torch::autograd::Function<RoiPool> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& boxes,
                        std::int64_t pooled_height, std::int64_t pooled_width, double spatial_scale,
                        bool rounding, bool deterministic, bool with_argmax) {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, std::int64_t, std::int64_t,
                                        double, bool, bool, bool)>("torchkiln::roi_pool");
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, argmax] = op.call(input, boxes, pooled_height, pooled_width, spatial_scale,
                                    rounding, deterministic, with_argmax);
    ctx->save_for_backward({argmax, boxes});
    ctx->saved_data["images"] = input.size(0);
    ctx->saved_data["height"] = input.size(2);
    ctx->saved_data["width"] = input.size(3);
    ctx->saved_data["spatial_scale"] = spatial_scale;
    ctx->saved_data["rounding"] = rounding;
    ctx->saved_data["deterministic"] = deterministic;
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt,
                    c10::SymInt, double, bool, bool)>("torchkiln::_roi_pool_backward");
    refuse_second_derivative("roi_pool", is_recorded(grads[0]));
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto saved = ctx->get_saved_variables();
    const Tensor grad =
        op.call(grads[0], saved[0], saved[1], ctx->saved_data["images"].toInt(),
                ctx->saved_data["height"].toInt(), ctx->saved_data["width"].toInt(),
                ctx->saved_data["spatial_scale"].toDouble(), ctx->saved_data["rounding"].toBool(),
                ctx->saved_data["deterministic"].toBool());
    return {grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

struct SigmoidFocalLoss : torch::autograd::Function<SigmoidFocalLoss> {
  static Tensor forward(AutogradContext* ctx, const Tensor& inputs, const Tensor& targets,
                        const std::optional<Tensor>& weight, double alpha, double gamma,
                        std::int64_t reduction) {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                        double, double, std::int64_t, bool)>(
            "torchkiln::sigmoid_focal_loss");
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({inputs, targets, weight.value_or(Tensor())});
    ctx->saved_data["alpha"] = alpha;
    ctx->saved_data["gamma"] = gamma;
    ctx->saved_data["reduction"] = reduction;
    return std::get<0>(op.call(inputs, targets, weight, alpha, gamma, reduction, false));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                    double, double, std::int64_t)>("torchkiln::_sigmoid_focal_loss_backward");
    const auto saved = ctx->get_saved_variables();
    TORCH_CHECK(!saved[1].requires_grad() && !(saved[2].defined() && saved[2].requires_grad()),
                "sigmoid_focal_loss: targets and weight get no gradient. Detach them");
    refuse_second_derivative("sigmoid_focal_loss", at::GradMode::is_enabled());
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto weight = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    const Tensor grad =
        op.call(grads[0], saved[0], saved[1], weight, ctx->saved_data["alpha"].toDouble(),
                ctx->saved_data["gamma"].toDouble(), ctx->saved_data["reduction"].toInt());
    return {grad, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace detail

// (N, M) overlaps of boxes (N, 4) and (M, 4), x1 y1 x2 y2; (N) of rows when aligned. Differentiable: both.
inline at::Tensor box_iou(const at::Tensor& boxes1, const at::Tensor& boxes2,
                          IouKind mode = IouKind::kPlain, double eps = 1e-7, bool aligned = false,
                          double offset = 0.0) {
  return detail::BoxIou::apply(boxes1, boxes2, static_cast<std::int64_t>(mode), eps, aligned,
                               offset);
}

// (K, C, pooled_height, pooled_width) from maps (N, C, H, W) and regions (K, 5): batch index, x1, y1, x2, y2 in image
// pixels. Differentiable: input.
inline at::Tensor roi_align(const at::Tensor& input, const at::Tensor& boxes,
                            std::int64_t pooled_height, std::int64_t pooled_width,
                            double spatial_scale = 1.0, std::int64_t sampling_ratio = -1,
                            bool aligned = false, Pooling pooling = Pooling::kAverage) {
  return detail::RoiAlign::apply(input, boxes, pooled_height, pooled_width, spatial_scale,
                                 sampling_ratio, aligned, static_cast<std::int64_t>(pooling));
}

// The maximum of each bin, shapes as of roi_align. Differentiable: input.
inline at::Tensor roi_pool(const at::Tensor& input, const at::Tensor& boxes,
                           std::int64_t pooled_height, std::int64_t pooled_width,
                           double spatial_scale = 1.0, bool rounding = true,
                           bool deterministic = false) {
  const bool needs_gradient = input.requires_grad() && at::GradMode::is_enabled();
  return detail::RoiPool::apply(input, boxes, pooled_height, pooled_width, spatial_scale, rounding,
                                deterministic, needs_gradient);
}

// Logits (N, C) with int64 labels (N,), or logits and targets of one shape. Differentiable: inputs.
inline at::Tensor sigmoid_focal_loss(const at::Tensor& inputs, const at::Tensor& targets,
                                     const std::optional<at::Tensor>& weight = std::nullopt,
                                     double alpha = 0.25, double gamma = 2.0,
                                     Reduction reduction = Reduction::kNone) {
  return detail::SigmoidFocalLoss::apply(inputs, targets, weight, alpha, gamma,
                                         static_cast<std::int64_t>(reduction));
}

}  // namespace torchkiln::autograd
