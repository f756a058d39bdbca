// What the CPU and the CUDA half of selective_scan share: checked arguments and the tensors behind them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <tuple>

#include "bindings/support/tensor.h"
#include "scan/selective_scan.h"

namespace torchkiln::bindings {

struct ScanSettings {
  bool softplus;
  std::int64_t method;
  bool reverse;
};

// Inputs of both directions. Those whose strides a kernel does not take are copies.
struct ScanInputs {
  Tensor u, delta, A, B, C;
  std::optional<Tensor> D, z, delta_bias;
  bool is_complex;
  std::int64_t method;
  selective_scan::Problem problem;

  ScalarType dtype() const { return u.scalar_type(); }
  // That of weights, states and sums.
  ScalarType wide() const {
    return dtype() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
  bool is_empty() const { return problem.batch * problem.dim * problem.length == 0; }
};

struct ScanPlan {
  ScanInputs inputs;
  std::optional<Tensor> initial_state;
  Tensor out, last_state, checkpoints;  // checkpoints: without elements where nobody wants them
  selective_scan::Args args;
};

struct ScanGradients {
  Tensor u, delta, A, B, C, D, z, delta_bias, initial_state;
};

// The sums of A, D, delta_bias and constant B and C are still those of each batch, those of variable ones of each part.
struct ScanBackwardPlan {
  ScanInputs inputs;
  Tensor grad_out, checkpoints;
  std::optional<Tensor> grad_last_state, initial_state;
  ScanGradients gradients;  // what make_sums() and make_results() make is not there before
  selective_scan::BackwardArgs args;
};

// `parts`: how many tensors take the gradients of variable B and C; 0: the blocks of a launch add to one.
struct ScanSums {
  Tensor B, C, A, D, delta_bias;
  bool direct;  // whether B and C are the results already
  bool adds_A;  // whether A is one sum
};
ScanSums make_sums(ScanBackwardPlan& plan, std::int64_t parts);
// The gradients that are written when all sums are there.
void make_results(ScanBackwardPlan& plan);

void run_scan_cpu(const ScanPlan& plan);
void run_scan_backward_cpu(ScanBackwardPlan& plan);

}  // namespace torchkiln::bindings
