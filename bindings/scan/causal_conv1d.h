// What the CPU and CUDA versions of causal_conv1d share: arguments with the tensors behind them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <tuple>

#include "bindings/support/tensor.h"
#include "scan/causal_conv1d.h"

namespace torchkiln::bindings::causal_conv1d {

using torchkiln::causal_conv1d::Args;
using Optional = std::optional<Tensor>;

constexpr const char* kOp = "causal_conv1d";

// The kernel arguments, and the tensors that keep their pointers alive.
struct Plan {
  Tensor x, weight, out;
  Optional bias, seq_idx, initial, grad_out, grad_weight, grad_bias, grad_initial, partials;
  bool columns;  // the channels are contiguous
  Args args;

  std::int64_t width() const { return args.width; }
  std::int64_t numel() const { return args.batch * args.channels * args.length; }
};

// Result of the backward: an empty tensor for what was not there.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor forward_cpu(const Plan& p);
void backward_cpu(const Plan& p);
// Allocates the slabs' sums.
Tensor forward_cuda(const Plan& p);
void backward_cuda(Plan& p);

}  // namespace torchkiln::bindings::causal_conv1d
