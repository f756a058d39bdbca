// causal_conv1d: schema, checks and shapes.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/scan/causal_conv1d.h"

#include <array>
#include <string>

#include "bindings/scan/parameters.h"
#include "bindings/support/check.h"

namespace torchkiln::bindings::causal_conv1d {
namespace {

using torchkiln::causal_conv1d::kMaxWidth;
using torchkiln::causal_conv1d::Strides;

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// (batch, channels, length), one of the last two contiguous, uninitialised.
Tensor empty_like_layout(const Tensor& like, bool columns) {
  const std::int64_t n = like.size(0), c = like.size(1), l = like.size(2);
  const std::array<std::int64_t, 3> shape = {n, c, l};
  if (!columns) return empty(like, like.scalar_type(), Shape(shape));
  const std::array<std::int64_t, 3> strides = {l * c, 1, c};
  return empty_strided(like, like.scalar_type(), Shape(shape), Shape(strides));
}

bool has_columns(const Tensor& tensor) { return tensor.stride(1) == 1 && tensor.stride(2) != 1; }

// The tensor itself when the dimension in question is contiguous already.
Tensor as_layout(const Tensor& tensor, bool columns) {
  if (tensor.stride(columns ? 1 : 2) == 1) return tensor;
  Tensor copy = empty_like_layout(tensor, columns);
  torch::stable::copy_(copy, tensor);
  return copy;
}

void check_like_x(const char* name, const Tensor& tensor, const Tensor& x) {
  check_same_dtype(kOp, name, tensor, "x", x);
  check_same_device(kOp, name, tensor, "x", x);
}

void check(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& seq_idx,
           const Optional& initial) {
  check_floating(kOp, "x", x);
  check_dim(kOp, "x", x, 3, "(B, D, L)");
  check_parameter(kOp, "weight", weight, x);
  check_dim(kOp, "weight", weight, 2, "(D, width)");
  if (weight.size(1) < 1 || weight.size(1) > kMaxWidth) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "weight",
         "have a width from 1 to " + std::to_string(kMaxWidth), std::to_string(weight.size(1)),
         "Use torch.nn.functional.conv1d with groups for longer filters");
  }
  check_shape(kOp, "weight", weight, {x.size(1), weight.size(1)});
  if (bias) {
    check_parameter(kOp, "bias", *bias, x);
    check_shape(kOp, "bias", *bias, {x.size(1)});
  }
  if (seq_idx) {
    if (seq_idx->scalar_type() != ScalarType::Int) {
      fail(TORCHKILN_ERROR_TYPE, kOp, "seq_idx", "be int32", text(seq_idx->scalar_type()),
           "Convert it with seq_idx.int()");
    }
    check_same_device(kOp, "seq_idx", *seq_idx, "x", x);
    check_shape(kOp, "seq_idx", *seq_idx, {x.size(0), x.size(2)});
  }
  if (initial) {
    check_like_x("initial_states", *initial, x);
    check_shape(kOp, "initial_states", *initial, {x.size(0), x.size(1), weight.size(1) - 1});
  }
}

const void* pointer_of(const Optional& tensor) {
  return tensor && tensor->numel() > 0 ? tensor->const_data_ptr() : nullptr;
}

Optional contiguous(const Optional& tensor) {
  return tensor ? Optional(as_contiguous(*tensor)) : std::nullopt;
}

Plan plan(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& seq_idx,
          const Optional& initial, bool silu) {
  check(x, weight, bias, seq_idx, initial);
  const bool columns = has_columns(x);
  Plan p{.x = as_layout(x, columns),
         .weight = as_contiguous(weight),
         .out = empty_like_layout(x, columns),
         .bias = contiguous(bias),
         .seq_idx = contiguous(seq_idx),
         .initial = contiguous(initial),
         .grad_out = {},
         .grad_weight = {},
         .grad_bias = {},
         .grad_initial = {},
         .partials = {},
         .columns = columns,
         .args = {}};
  Args& a = p.args;
  a.x = p.x.const_data_ptr();
  a.weight = p.weight.const_data_ptr();
  a.bias = pointer_of(p.bias);
  a.seq_idx = pointer_of(p.seq_idx);
  a.initial = pointer_of(p.initial);
  a.out = p.out.mutable_data_ptr();
  a.x_strides = strides_of(p.x);
  a.out_strides = strides_of(p.out);
  a.batch = x.size(0);
  a.channels = x.size(1);
  a.length = x.size(2);
  a.slabs = 1;
  a.width = static_cast<i32>(weight.size(1));
  a.silu = silu;
  a.weight_is_float = weight.scalar_type() == ScalarType::Float;
  a.bias_is_float = bias && bias->scalar_type() == ScalarType::Float;
  return p;
}

Plan plan_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                   const Optional& bias, const Optional& seq_idx, const Optional& initial,
                   bool silu) {
  Plan p = plan(x, weight, bias, seq_idx, initial, silu);
  check_like_x("grad_out", grad_out, x);
  check_shape(kOp, "grad_out", grad_out, {x.size(0), x.size(1), x.size(2)});
  p.grad_out = as_layout(grad_out, p.columns);
  p.args.grad_out = p.grad_out->const_data_ptr();
  p.args.grad_strides = strides_of(*p.grad_out);
  // Without positions nobody writes them.
  const auto made = [&](const Tensor& like) {
    return p.numel() == 0 ? zeros(like, like.scalar_type(), shape_of(like))
                          : empty(like, like.scalar_type(), shape_of(like));
  };
  p.grad_weight = made(p.weight);
  p.args.grad_weight = p.grad_weight->mutable_data_ptr();
  if (p.bias) {
    p.grad_bias = made(*p.bias);
    p.args.grad_bias = p.grad_bias->mutable_data_ptr();
  }
  if (p.initial) {
    p.grad_initial = made(*p.initial);
    if (p.initial->numel() > 0) p.args.grad_initial = p.grad_initial->mutable_data_ptr();
  }
  return p;
}

Gradients gradients(const Plan& p) {
  const auto or_empty = [&](const Optional& tensor) {
    return tensor ? *tensor : empty(p.x, p.x.scalar_type(), {0});
  };
  return {p.out, *p.grad_weight, or_empty(p.grad_bias), or_empty(p.grad_initial)};
}

struct Cpu {
  static Tensor forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                        const Optional& seq_idx, const Optional& initial_states, bool silu) {
    return forward_cpu(plan(x, weight, bias, seq_idx, initial_states, silu));
  }
  static Gradients backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                            const Optional& bias, const Optional& seq_idx,
                            const Optional& initial_states, bool silu) {
    const Plan p = plan_backward(grad_out, x, weight, bias, seq_idx, initial_states, silu);
    if (p.numel() > 0) backward_cpu(p);
    return gradients(p);
  }
};

struct Cuda {
  static Tensor forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                        const Optional& seq_idx, const Optional& initial_states, bool silu) {
    return forward_cuda(plan(x, weight, bias, seq_idx, initial_states, silu));
  }
  static Gradients backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                            const Optional& bias, const Optional& seq_idx,
                            const Optional& initial_states, bool silu) {
    Plan p = plan_backward(grad_out, x, weight, bias, seq_idx, initial_states, silu);
    if (p.numel() > 0) backward_cuda(p);
    return gradients(p);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? seq_idx=None, "
      "Tensor? initial_states=None, bool silu=False) -> Tensor");
  m.def(
      "_causal_conv1d_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? seq_idx, Tensor? initial_states, bool silu) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&Cpu::forward));
  m.impl("_causal_conv1d_backward", TORCH_BOX(&Cpu::backward));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("causal_conv1d", TORCH_BOX(&Cuda::forward));
  m.impl("_causal_conv1d_backward", TORCH_BOX(&Cuda::backward));
}

}  // namespace torchkiln::bindings::causal_conv1d
