// selective_scan: kernels, checks and shapes, launches, schema. The CPU's loops are in selective_scan_cpu.cpp.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/scan/selective_scan.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/layout.h"
#include "scan/selective_scan_shared.h"

namespace torchkiln::bindings {
namespace {

using selective_scan::Args;
using selective_scan::BackwardArgs;
using selective_scan::kCheckpoint;
using selective_scan::kMaxLength;
using selective_scan::kMaxStates;
using selective_scan::SumArgs;

constexpr const char* kOp = "selective_scan";

// ---- kernels ----

// summarises: whether only summaries of splits are written.
struct Statics {
  std::int64_t scalar, method, is_complex, summarises;
};
// variable: whether both B and C are.
struct BackwardStatics {
  std::int64_t scalar, method, is_complex, variable;
};
struct Sizes {
  std::int64_t length, states;
  std::int64_t groups, channels;  // groups: of all batches; channels: of one group
  std::int64_t splits, parts;     // parts: tensors that blocks write gradients to, 0 where they add
};
// lanes: of a channel; states: of a lane; row_bytes: what the positions of a tile take of a state.
struct Tunables {
  std::int64_t warps, lanes, states, row_bytes;
};
// panels: of all states, as many as lanes go through at once.
struct BackwardTunables {
  std::int64_t warps, lanes, states, panels;
};
struct SummaryTunables {
  std::int64_t warps, lanes, states;
};
struct SumStatics {
  std::int64_t scalar;
};
struct SumSizes {
  std::int64_t count;
};
struct BlockSize {
  std::int64_t block_size;
};

using Forward = Kernel<Args, Statics, Sizes, Tunables>;
using Backward = Kernel<BackwardArgs, BackwardStatics, Sizes, BackwardTunables>;
using Summary = Kernel<BackwardArgs, BackwardStatics, Sizes, SummaryTunables>;
using Sum = Kernel<SumArgs, SumStatics, SumSizes, BlockSize>;

constexpr std::int64_t kWarp = 32;

// Of a block.
template <class AnyTunables>
std::int64_t channels_of(const AnyTunables& t) {
  return t.warps * kWarp / t.lanes;
}

template <class Problem>
std::int64_t scalar_bytes(const Problem& p) {
  return p.statics.scalar == TORCHKILN_DOUBLE ? 8 : 4;
}
template <class Problem>
std::int64_t state_bytes(const Problem& p) {
  return scalar_bytes(p) * (p.statics.is_complex ? 2 : 1);
}
std::int64_t panels(const Sizes& sizes, std::int64_t channels) {
  return sizes.groups * ceil_div(sizes.channels, channels);
}

// What selective_scan.cuh lays out in shared memory.
std::int64_t shared_bytes(const Forward::Problem& p, const Tunables& t) {
  const auto number = static_cast<int>(state_bytes(p)), real = static_cast<int>(scalar_bytes(p));
  const auto tile = static_cast<int>(t.row_bytes) / number;
  const std::int64_t matrix =
      selective_scan::matrix_numbers(static_cast<int>(t.warps * kWarp), static_cast<int>(t.lanes),
                                     static_cast<int>(t.states), tile, number);
  const auto method = static_cast<int>(p.statics.method);
  const std::int64_t rows =
      channels_of(t) * selective_scan::step_arrays(method) +
      (selective_scan::keeps_parts(method, static_cast<int>(t.lanes)) ? t.warps * kWarp : 0);
  const std::int64_t row_numbers =
      rows * selective_scan::pitch_of(tile, real) + t.warps * selective_scan::kBehind;
  return 2 * matrix * number + row_numbers * real;
}
// Whether lanes have places for all states, and not many more.
bool is_close(std::int64_t states, std::int64_t places) {
  return states <= places && places < std::max<std::int64_t>(4 * states, 32);
}
bool fits(const Forward::Problem& p, const Tunables& t) {
  return is_close(p.sizes.states, t.lanes * t.states) && t.row_bytes >= 4 * state_bytes(p) &&
         shared_bytes(p, t) <= p.device.shared_bytes_per_block;
}

// By the number of states. Few rows are split among blocks rather than among more lanes, which would share less. Positions
// of half types fill a line of 128 bytes with the first one. The last but one is for states that fill the shared memory, the
// last one for rows that are split, of which so few are at work at once that a lane waits less for eight states of its own.
const std::vector<Tunables> kForwardDefaults = {{4, 8, 2, 256},  {4, 8, 2, 128}, {4, 4, 1, 128},
                                                {8, 32, 2, 128}, {8, 32, 8, 64}, {2, 32, 8, 64},
                                                {2, 2, 8, 128}};

// Whether the first one fits, and three blocks of it where lanes leave their parts in shared memory.
bool holds_long_tiles(const Forward::Problem& p) {
  constexpr std::int64_t kBlocks = 3, kReserved = 1024;  // reserved: of each block, by the driver
  const Tunables& t = kForwardDefaults[0];
  const bool has_parts =
      selective_scan::keeps_parts(static_cast<int>(p.statics.method), static_cast<int>(t.lanes));
  const std::int64_t room = p.device.shared_bytes_per_block + kReserved;
  return fits(p, t) && (!has_parts || kBlocks * (shared_bytes(p, t) + kReserved) <= room);
}

std::uint32_t choose_forward(const Forward::Problem& p) {
  const std::int64_t states = p.sizes.states, scalar = p.statics.scalar;
  if (states > 64) return fits(p, kForwardDefaults[4]) ? 4 : 5;
  if (states > 16) return 3;
  if (states <= 4) return 2;
  const bool is_half = scalar == TORCHKILN_HALF || scalar == TORCHKILN_BFLOAT16;
  if (!is_half || p.statics.is_complex) return 1;
  const bool is_split = p.statics.summarises || p.sizes.splits > 1;
  if (is_split && p.statics.method == selective_scan::kMamba && states > 8) return 6;
  return holds_long_tiles(p) ? 0 : 1;
}
Geometry forward_geometry(const Forward::Problem& p, const Tunables& t) {
  return linear(panels(p.sizes, channels_of(t)) * p.sizes.splits, t.warps * kWarp,
                static_cast<std::uint32_t>(shared_bytes(p, t)));
}

// What selective_scan_backward.cuh lays out in shared memory.
template <class Problem, class AnyTunables>
std::int64_t row_bytes(const Problem& p, const AnyTunables& t, std::int64_t panel_count) {
  const int arrays = selective_scan::backward_arrays(static_cast<int>(p.statics.method),
                                                     static_cast<int>(panel_count));
  return scalar_bytes(p) * arrays * channels_of(t) * selective_scan::kTilePitch;
}
std::int64_t shared_bytes(const Backward::Problem& p, const BackwardTunables& t) {
  const auto padded = static_cast<int>(t.lanes * t.states);
  const std::int64_t of_warp =
      selective_scan::four_numbers(static_cast<int>(t.lanes), static_cast<int>(t.states));
  const std::int64_t of_sums =
      selective_scan::sums_numbers(static_cast<int>(p.statics.method), static_cast<int>(t.lanes),
                                   static_cast<int>(t.states), static_cast<int>(state_bytes(p)));
  return state_bytes(p) *
             (2 * padded * selective_scan::kTilePitch + t.warps * (of_warp + of_sums)) +
         row_bytes(p, t, t.panels);
}
std::int64_t shared_bytes(const Summary::Problem& p, const SummaryTunables& t) {
  return state_bytes(p) * t.lanes * t.states * selective_scan::kTilePitch + row_bytes(p, t, 1);
}
bool fits(const Summary::Problem& p, const SummaryTunables& t) {
  return t.lanes * t.states < std::max<std::int64_t>(4 * p.sizes.states, 32) &&
         shared_bytes(p, t) <= p.device.shared_bytes_per_block;
}
// Each block needs a part of its own.
bool fits(const Backward::Problem& p, const BackwardTunables& t) {
  const std::int64_t padded = t.lanes * t.states, states = p.sizes.states;
  const bool has_places =
      t.panels == 1 ? is_close(states, padded) : states > padded && states <= t.panels * padded;
  const bool has_parts =
      p.sizes.parts == 0 || ceil_div(p.sizes.channels, channels_of(t)) <= p.sizes.parts;
  return has_places && has_parts && shared_bytes(p, t) <= p.device.shared_bytes_per_block;
}
// The last ones are for many states, and for those that fill the shared memory.
const std::vector<BackwardTunables> kBackwardDefaults = {{4, 4, 4, 1}, {4, 4, 2, 1}, {4, 4, 1, 1},
                                                         {4, 8, 4, 1}, {2, 8, 4, 8}, {1, 4, 4, 16},
                                                         {1, 4, 2, 32}};
// Which of the first four, in both tables.
std::uint32_t choose_by_states(std::int64_t states) {
  return states > 16 ? 3 : (states > 8 ? 0 : (states > 4 ? 1 : 2));
}
std::uint32_t choose_backward(const Backward::Problem& p) {
  std::uint32_t chosen = choose_by_states(p.sizes.states);
  while (chosen + 1 < kBackwardDefaults.size() && !fits(p, kBackwardDefaults[chosen])) {
    chosen = std::max<std::uint32_t>(chosen + 1, 3);
  }
  return chosen;
}
// More states are gone through in turns.
const std::vector<SummaryTunables> kSummaryDefaults = {{4, 4, 4}, {4, 4, 2}, {4, 4, 1}, {4, 8, 4}};
std::uint32_t choose_summary(const Summary::Problem& p) { return choose_by_states(p.sizes.states); }
template <class Problem, class AnyTunables>
Geometry backward_geometry(const Problem& p, const AnyTunables& t) {
  return linear(panels(p.sizes, channels_of(t)) * p.sizes.splits, t.warps * kWarp,
                static_cast<std::uint32_t>(shared_bytes(p, t)));
}

std::vector<Parameter> statics(const char* flag) {
  std::vector<std::int64_t> methods(selective_scan::kMethods);
  for (std::size_t i = 0; i < methods.size(); ++i) methods[i] = static_cast<std::int64_t>(i);
  return {types("scalar", kFloatTypes), ints("method", methods), bools("complex"), bools(flag)};
}

const std::vector<torchkiln_size> kSizes = {
    {"length", TORCHKILN_BUCKET_POW2}, {"states", TORCHKILN_BUCKET_POW2},
    {"groups", TORCHKILN_BUCKET_NONE}, {"channels", TORCHKILN_BUCKET_POW2},
    {"splits", TORCHKILN_BUCKET_NONE}, {"parts", TORCHKILN_BUCKET_NONE}};

const Forward forward_kernel({
    .path = "scan/selective_scan.cuh",
    .entry = "forward",
    .operators = {kOp},
    .statics = statics("summarises"),
    .sizes = kSizes,
    .tunables = {ints("warps", {2, 4, 8}), ints("lanes", {1, 2, 4, 8, 16, 32}),
                 ints("states", {1, 2, 4, 8}), ints("row_bytes", {64, 128, 256, 512})},
    .defaults = kForwardDefaults,
    .legal = &fits,
    .choose = &choose_forward,
    .geometry = &forward_geometry,
});

// Its chunks begin where the forward keeps states.
const Backward backward_kernel({
    .path = "scan/selective_scan_backward.cuh",
    .entry = "backward",
    .operators = {kOp},
    .statics = statics("variable"),
    .sizes = kSizes,
    .tunables = {ints("warps", {1, 2, 4, 8}), ints("lanes", {1, 2, 4, 8, 16, 32}),
                 ints("states", {1, 2, 4, 8}), ints("panels", {1, 2, 4, 8, 16, 32})},
    .defaults = kBackwardDefaults,
    .legal = &fits,
    .choose = &choose_backward,
    .geometry = &backward_geometry<Backward::Problem, BackwardTunables>,
});

const Summary summarise_kernel({
    .path = "scan/selective_scan_backward.cuh",
    .entry = "summarise",
    .operators = {kOp},
    .statics = statics("variable"),
    .sizes = kSizes,
    .tunables = {ints("warps", {1, 2, 4, 8}), ints("lanes", {1, 2, 4, 8, 16, 32}),
                 ints("states", {1, 2, 4, 8})},
    .defaults = kSummaryDefaults,
    .legal = &fits,
    .choose = &choose_summary,
    .geometry = &backward_geometry<Summary::Problem, SummaryTunables>,
});

const Sum sum_kernel({
    .path = "scan/selective_scan_backward.cuh",
    .entry = "sum_parts",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {{"count", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}},
    .geometry =
        [](const Sum::Problem& p, const BlockSize& t) {
          const std::int64_t resident = 8 * p.device.multiprocessors;
          return linear(std::min(ceil_div(p.sizes.count, t.block_size), resident), t.block_size);
        },
});

// ---- checks and shapes ----

using Optional = std::optional<Tensor>;

void check_like_u(const char* name, const Tensor& tensor, const Tensor& u) {
  check_same_dtype(kOp, name, tensor, "u", u);
  check_same_device(kOp, name, tensor, "u", u);
  check_shape(kOp, name, tensor, {u.size(0), u.size(1), u.size(2)});
}

void check_wide(const char* name, const Tensor& tensor, const Tensor& u) {
  const ScalarType wide =
      u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (tensor.scalar_type() != wide) {
    fail(TORCHKILN_ERROR_TYPE, kOp, name,
         "be " + text(wide) + " beside u of " + text(u.scalar_type()), text(tensor.scalar_type()));
  }
  check_same_device(kOp, name, tensor, "u", u);
}

void check_optional_weight(const char* name, const Optional& tensor, const Tensor& u) {
  if (!tensor) return;
  check_wide(name, *tensor, u);
  check_shape(kOp, name, *tensor, {u.size(1)});
}

void check_A(const Tensor& A, const Tensor& u) {
  check_wide("A", A, u);
  const bool is_complex = A.dim() == 3;
  if (!(is_complex || A.dim() == 2) || A.size(0) != u.size(1) || (is_complex && A.size(2) != 2)) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "A", "have shape (" + std::to_string(u.size(1)) + ", N)",
         text(A));
  }
  if (A.size(1) < 1 || A.size(1) > kMaxStates) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "A", "have 1 to " + std::to_string(kMaxStates) + " states",
         std::to_string(A.size(1)));
  }
}

// A constant matrix has the form of A; a variable one is (batch, groups, states, length).
bool is_constant(const Tensor& matrix) { return matrix.dim() < 4; }

void check_matrix(const char* name, const Tensor& matrix, const Tensor& u, const Tensor& A) {
  const std::int64_t parts = A.dim() == 3 ? 2 : 1;
  if (is_constant(matrix)) {
    check_wide(name, matrix, u);
    const Shape wanted = shape_of(A), got = shape_of(matrix);
    if (std::equal(wanted.begin(), wanted.end(), got.begin(), got.end())) return;
    fail(TORCHKILN_ERROR_VALUE, kOp, name,
         "have the shape of A " + text(A) + " or vary with the positions", text(matrix));
  }
  check_same_dtype(kOp, name, matrix, "u", u);
  check_same_device(kOp, name, matrix, "u", u);
  const bool fits = matrix.dim() == 4 && matrix.size(0) == u.size(0) &&
                    matrix.size(2) == A.size(1) && matrix.size(3) == parts * u.size(2);
  if (!fits) {
    fail(TORCHKILN_ERROR_VALUE, kOp, name,
         "have shape (" + std::to_string(u.size(0)) + ", G, " + std::to_string(A.size(1)) + ", " +
             std::to_string(parts * u.size(2)) + ")",
         text(matrix));
  }
  if (matrix.size(1) < 1 || u.size(1) % matrix.size(1) != 0) {
    fail(TORCHKILN_ERROR_VALUE, kOp, name,
         "have a number of groups that divides the " + std::to_string(u.size(1)) + " channels",
         std::to_string(matrix.size(1)));
  }
}

std::int64_t groups_of(const Tensor& B, const Tensor& C) {
  if (is_constant(B)) return is_constant(C) ? 1 : C.size(1);
  if (!is_constant(C) && C.size(1) != B.size(1)) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "C",
         "have the groups of B (" + std::to_string(B.size(1)) + ")", std::to_string(C.size(1)));
  }
  return B.size(1);
}

// Rows whose positions are neighbours in memory; others are copied.
Tensor as_rows(const Tensor& tensor) {
  return tensor.stride(2) == 1 || tensor.size(2) <= 1 ? tensor : torch::stable::contiguous(tensor);
}
selective_scan::Rows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

bool has_aligned_rows(const Tensor& tensor) {
  const auto per_pack = static_cast<std::int64_t>(16 / element_size(tensor.scalar_type()));
  return aligned_to_16(tensor.const_data_ptr()) && tensor.stride(0) % per_pack == 0 &&
         tensor.stride(1) % per_pack == 0 && tensor.size(2) % per_pack == 0;
}

Optional contiguous_or_none(const Optional& tensor) {
  return tensor ? Optional(as_contiguous(*tensor)) : std::nullopt;
}
const void* data_or_null(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

ScanInputs plan_inputs(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                       const Tensor& C, const Optional& D, const Optional& z,
                       const Optional& delta_bias, const ScanSettings& settings) {
  check_floating(kOp, "u", u);
  check_dim(kOp, "u", u, 3, "(batch, dim, length)");
  if (u.size(2) > kMaxLength) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "u",
         "have at most " + std::to_string(kMaxLength) + " positions", std::to_string(u.size(2)));
  }
  check_like_u("delta", delta, u);
  check_A(A, u);
  check_matrix("B", B, u, A);
  check_matrix("C", C, u, A);
  check_optional_weight("D", D, u);
  if (z) check_like_u("z", *z, u);
  check_optional_weight("delta_bias", delta_bias, u);
  if (settings.method < 0 || settings.method >= selective_scan::kMethods) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "method", "be from 0 to 10", std::to_string(settings.method));
  }
  ScanInputs in{.u = as_rows(u),
                .delta = as_rows(delta),
                .A = as_contiguous(A),
                .B = as_contiguous(B),
                .C = as_contiguous(C),
                .D = contiguous_or_none(D),
                .z = z ? Optional(as_rows(*z)) : std::nullopt,
                .delta_bias = contiguous_or_none(delta_bias),
                .is_complex = A.dim() == 3,
                .method = settings.method,
                .problem = {}};
  const bool aligned = has_aligned_rows(in.u) && has_aligned_rows(in.delta) &&
                       (!in.z || has_aligned_rows(*in.z)) && aligned_to_16(in.B.const_data_ptr()) &&
                       aligned_to_16(in.C.const_data_ptr());
  in.problem = {.u = rows_of(in.u),
                .delta = rows_of(in.delta),
                .z = in.z ? rows_of(*in.z) : selective_scan::Rows{nullptr, 0, 0},
                .A = in.A.const_data_ptr(),
                .B = in.B.const_data_ptr(),
                .C = in.C.const_data_ptr(),
                .D = data_or_null(in.D),
                .delta_bias = data_or_null(in.delta_bias),
                .batch = u.size(0),
                .dim = u.size(1),
                .groups = groups_of(B, C),
                .states = A.size(1),
                .length = u.size(2),
                .tiles = ceil_div(u.size(2), kCheckpoint),
                .constant_B = is_constant(B),
                .constant_C = is_constant(C),
                .softplus = settings.softplus,
                .reverse = settings.reverse,
                .aligned = aligned};
  return in;
}

// (batch, dim, [more,] N [, 2]).
Tensor empty_states(const ScanInputs& in, std::initializer_list<std::int64_t> more = {}) {
  std::vector<std::int64_t> shape = {in.problem.batch, in.problem.dim};
  shape.insert(shape.end(), more);
  shape.push_back(in.problem.states);
  if (in.is_complex) shape.push_back(2);
  return empty(in.u, in.wide(), Shape(shape));
}
// Those that are kept: before all tiles but the first one.
std::int64_t kept_states(const ScanInputs& in) {
  return std::max<std::int64_t>(in.problem.tiles - 1, 0);
}

void check_state(const char* name, const Optional& state, const ScanInputs& in) {
  if (!state) return;
  check_wide(name, *state, in.u);
  if (in.is_complex) {
    check_shape(kOp, name, *state, {in.problem.batch, in.problem.dim, in.problem.states, 2});
  } else {
    check_shape(kOp, name, *state, {in.problem.batch, in.problem.dim, in.problem.states});
  }
}

ScanPlan plan_forward(ScanInputs in, const Optional& initial_state, bool with_checkpoints) {
  check_state("initial_state", initial_state, in);
  ScanPlan p{.inputs = std::move(in),
             .initial_state = contiguous_or_none(initial_state),
             .out = {},
             .last_state = {},
             .checkpoints = {},
             .args = {}};
  const ScanInputs& inputs = p.inputs;
  p.out = empty(inputs.u, inputs.dtype(), shape_of(inputs.u));
  p.last_state = empty_states(inputs);
  p.checkpoints = with_checkpoints ? empty_states(inputs, {kept_states(inputs)})
                                   : empty(inputs.u, inputs.wide(), {0});
  p.args = {.problem = inputs.problem,
            .initial_state = data_or_null(p.initial_state),
            .out = p.out.mutable_data_ptr(),
            .last_state = p.last_state.mutable_data_ptr(),
            .checkpoints = with_checkpoints ? p.checkpoints.mutable_data_ptr() : nullptr,
            .summaries = nullptr,
            .splits = 1};
  return p;
}

// `any_stride`: whether the gradient of the output is taken as it is, or as rows.
ScanBackwardPlan plan_backward(ScanInputs in, const Tensor& grad_out, const Optional& grad_last,
                               const Optional& initial_state, const Tensor& checkpoints,
                               bool any_stride) {
  check_like_u("grad_out", grad_out, in.u);
  check_state("grad_last_state", grad_last, in);
  check_state("initial_state", initial_state, in);
  check_wide("checkpoints", checkpoints, in.u);
  const std::int64_t states = in.problem.batch * in.problem.dim * kept_states(in) *
                              in.problem.states * (in.is_complex ? 2 : 1);
  if (checkpoints.numel() != states) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "checkpoints", "be those of the forward", text(checkpoints));
  }
  ScanBackwardPlan p{.inputs = std::move(in),
                     .grad_out = any_stride ? grad_out : as_rows(grad_out),
                     .checkpoints = as_contiguous(checkpoints),
                     .grad_last_state = contiguous_or_none(grad_last),
                     .initial_state = contiguous_or_none(initial_state),
                     .gradients = {},
                     .args = {}};
  const ScanInputs& inputs = p.inputs;
  const auto rows = [&] { return empty(inputs.u, inputs.dtype(), shape_of(inputs.u)); };
  p.gradients.u = rows();
  p.gradients.delta = rows();
  p.gradients.z = inputs.z ? rows() : empty(inputs.u, inputs.dtype(), {0});
  p.gradients.initial_state =
      p.initial_state ? empty_states(inputs) : empty(inputs.u, inputs.wide(), {0});
  p.args.problem = inputs.problem;
  p.args.grad_stride = p.grad_out.size(2) > 1 ? p.grad_out.stride(2) : 1;
  p.args.problem.aligned =
      inputs.problem.aligned && (p.args.grad_stride != 1 || has_aligned_rows(p.grad_out));
  p.args.grad_out = rows_of(p.grad_out);
  p.args.grad_last_state = data_or_null(p.grad_last_state);
  p.args.initial_state = data_or_null(p.initial_state);
  p.args.checkpoints = p.checkpoints.const_data_ptr();
  p.args.splits = 1;
  p.args.grad_u = p.gradients.u.mutable_data_ptr();
  p.args.grad_delta = p.gradients.delta.mutable_data_ptr();
  p.args.grad_z = inputs.z ? p.gradients.z.mutable_data_ptr() : nullptr;
  p.args.grad_initial_state =
      p.initial_state ? p.gradients.initial_state.mutable_data_ptr() : nullptr;
  return p;
}

// (count, batch, dim, N [, 2]).
Tensor split_states(const ScanInputs& in, std::int64_t count) {
  const selective_scan::Problem& p = in.problem;
  return empty(in.u, in.wide(), {count, p.batch * p.dim * p.states * (in.is_complex ? 2 : 1)});
}

// Sums that blocks add to in a half type, in one tensor, which one launch clears.
class Cleared {
 public:
  Cleared(const Tensor& like, std::int64_t numbers)
      : all_(zeros(like, ScalarType::Float, {numbers})) {}
  Tensor part(const Tensor& like) {
    const std::int64_t first = std::exchange(used_, used_ + like.numel());
    return torch::stable::narrow(all_, 0, first, like.numel());
  }

 private:
  Tensor all_;
  std::int64_t used_ = 0;
};

}  // namespace

ScanSums make_sums(ScanBackwardPlan& p, std::int64_t parts) {
  const selective_scan::Problem& problem = p.inputs.problem;
  const auto of_batches = [&](const Optional& weight) {
    return empty(p.inputs.u, p.inputs.wide(),
                 {weight ? p.args.splits * problem.batch : 0, problem.dim});
  };
  const ScanInputs& in = p.inputs;
  const bool is_half = in.dtype() != in.wide(), adds = parts == 0;
  Cleared cleared(in.u, adds && is_half ? in.A.numel() + in.B.numel() + in.C.numel() : 0);
  const auto matrix = [&](const Tensor& input, bool constant, Tensor& result) {
    if (constant) return split_states(in, p.args.splits);
    if (!adds) return zeros(input, in.wide(), {parts, input.numel()});
    if (is_half) return cleared.part(input);
    result = zeros(input, in.wide(), shape_of(input));
    return result;
  };
  // Packs of B and C come first, so that they are aligned.
  ScanSums sums{.B = matrix(in.B, problem.constant_B, p.gradients.B),
                .C = matrix(in.C, problem.constant_C, p.gradients.C),
                .A = adds && is_half ? cleared.part(in.A) : split_states(in, p.args.splits),
                .D = of_batches(in.D),
                .delta_bias = of_batches(in.delta_bias),
                .direct = adds && !is_half,
                .adds_A = adds && is_half};
  p.args.grad_A = sums.A.mutable_data_ptr();
  p.args.grad_B = sums.B.mutable_data_ptr();
  p.args.grad_C = sums.C.mutable_data_ptr();
  p.args.grad_D = p.inputs.D ? sums.D.mutable_data_ptr() : nullptr;
  p.args.grad_delta_bias = p.inputs.delta_bias ? sums.delta_bias.mutable_data_ptr() : nullptr;
  p.args.adds = adds;
  p.args.adds_A = sums.adds_A;
  return sums;
}

void make_results(ScanBackwardPlan& p) {
  const ScanInputs& in = p.inputs;
  const auto weight = [&](const Optional& tensor) {
    return empty(in.u, in.wide(), {tensor ? in.problem.dim : 0});
  };
  const auto like = [](const Tensor& tensor) {
    return empty(tensor, tensor.scalar_type(), shape_of(tensor));
  };
  ScanGradients& g = p.gradients;
  g.A = like(in.A);
  if (!g.B.defined()) g.B = like(in.B);
  if (!g.C.defined()) g.C = like(in.C);
  g.D = weight(in.D);
  g.delta_bias = weight(in.delta_bias);
}

SumArgs sums_of(const ScanBackwardPlan& p, const ScanSums& sums, std::int64_t parts) {
  const selective_scan::Problem& problem = p.inputs.problem;
  const std::int64_t rows = p.args.splits * problem.batch;
  SumArgs args{};
  int n = 0;
  const auto add = [&](const Tensor& from, const Tensor& to, std::int64_t count, bool narrow) {
    if (to.numel() == 0) return;
    args.segments[n++] = {.from = from.const_data_ptr(),
                          .to = to.mutable_data_ptr(),
                          .count = to.numel(),
                          .parts = count,
                          .narrow = narrow};
  };
  add(sums.A, p.gradients.A, sums.adds_A ? 1 : rows, false);
  add(sums.D, p.gradients.D, rows, false);
  add(sums.delta_bias, p.gradients.delta_bias, rows, false);
  const std::int64_t variable = std::max<std::int64_t>(parts, 1);
  for (const auto& [from, to, constant] :
       {std::tuple{&sums.B, &p.gradients.B, problem.constant_B},
        std::tuple{&sums.C, &p.gradients.C, problem.constant_C}}) {
    if (constant) {
      add(*from, *to, rows, false);
    } else if (!sums.direct) {
      add(*from, *to, variable, true);
    }
  }
  return args;
}

namespace {

// Without positions nothing but the initial state is left.
void pass_state(const ScanPlan& p) {
  Tensor last = p.last_state;
  if (p.initial_state) {
    torch::stable::copy_(last, *p.initial_state);
  } else {
    torch::stable::zero_(last);
  }
}
void pass_gradient(ScanBackwardPlan& p) {
  make_results(p);
  const ScanGradients& g = p.gradients;
  for (Tensor zero : {g.u, g.delta, g.A, g.B, g.C, g.D, g.z, g.delta_bias, g.initial_state}) {
    torch::stable::zero_(zero);
  }
  Tensor state = g.initial_state;
  if (p.initial_state && p.grad_last_state) torch::stable::copy_(state, *p.grad_last_state);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients as_tuple(const ScanGradients& g) {
  return {g.u, g.delta, g.A, g.B, g.C, g.D, g.z, g.delta_bias, g.initial_state};
}

// ---- CPU ----

Outputs cpu(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
            const Optional& D, const Optional& z, const Optional& delta_bias, bool delta_softplus,
            std::int64_t method, const Optional& initial_state, bool reverse, bool with_checkpoints,
            bool /* deterministic */) {
  const ScanPlan p = plan_forward(
      plan_inputs(u, delta, A, B, C, D, z, delta_bias, {delta_softplus, method, reverse}),
      initial_state, with_checkpoints);
  if (p.inputs.is_empty()) {
    pass_state(p);
  } else {
    run_scan_cpu(p);
  }
  return {p.out, p.last_state, p.checkpoints};
}

Gradients backward_cpu(const Tensor& grad_out, const Optional& grad_last_state, const Tensor& u,
                       const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                       const Optional& D, const Optional& z, const Optional& delta_bias,
                       const Optional& initial_state, const Tensor& checkpoints,
                       bool delta_softplus, std::int64_t method, bool reverse,
                       bool /* deterministic */) {
  ScanBackwardPlan p = plan_backward(
      plan_inputs(u, delta, A, B, C, D, z, delta_bias, {delta_softplus, method, reverse}), grad_out,
      grad_last_state, initial_state, checkpoints, false);
  if (p.inputs.is_empty()) {
    pass_gradient(p);
  } else {
    run_scan_backward_cpu(p);
  }
  return as_tuple(p.gradients);
}

// ---- CUDA ----

Statics statics_of(const ScanInputs& in, bool summarises) {
  return {kernel_type(in.dtype()), in.method, in.is_complex, summarises};
}
BackwardStatics backward_statics_of(const ScanInputs& in) {
  const selective_scan::Problem& p = in.problem;
  return {kernel_type(in.dtype()), in.method, in.is_complex, !p.constant_B && !p.constant_C};
}

Sizes sizes_of(const ScanInputs& in, std::int64_t splits, std::int64_t parts) {
  const selective_scan::Problem& p = in.problem;
  return {p.length, p.states, p.batch * p.groups, p.dim / p.groups, splits, parts};
}

// As many as the kernel has blocks that share a gradient.
std::int64_t parts_of(const ScanInputs& in, const Device& device) {
  const BackwardStatics statics = backward_statics_of(in);
  const Sizes sizes = sizes_of(in, 1, 0);
  const BackwardTunables& chosen =
      kBackwardDefaults[choose_backward(Backward::Problem{device, statics, sizes})];
  return ceil_div(sizes.channels, channels_of(chosen));
}

// Warps that a multiprocessor holds.
constexpr std::int64_t kResidentWarps = 16;

// A split's positions are gone through twice, which pays where blocks would fill less than half of the GPU. Twice as many as
// it holds leave few multiprocessors without work in the end; splits are of several tiles.
std::int64_t splits_of(const ScanInputs& in, const Device& device) {
  constexpr std::int64_t kLeastLength = 256;
  const Sizes sizes = sizes_of(in, 1, 0);
  const Tunables& chosen =
      kForwardDefaults[choose_forward(Forward::Problem{device, statics_of(in, false), sizes})];
  const std::int64_t blocks = panels(sizes, channels_of(chosen));
  const std::int64_t resident = kResidentWarps / chosen.warps * device.multiprocessors;
  if (2 * blocks > resident) return 1;
  return std::clamp<std::int64_t>(in.problem.length / kLeastLength, 1,
                                  ceil_div(2 * resident, blocks));
}

// As many as leave no block waiting for another one, of several tiles each.
std::int64_t backward_splits_of(const ScanInputs& in, const Device& device) {
  constexpr std::int64_t kLeastTiles = 4;
  const Sizes sizes = sizes_of(in, 1, 0);
  const BackwardStatics statics = backward_statics_of(in);
  const Backward::Problem problem{device, statics, sizes};
  const BackwardTunables& chosen = kBackwardDefaults[choose_backward(problem)];
  const std::int64_t blocks = panels(sizes, channels_of(chosen));
  const std::int64_t warps = selective_scan::resident_warps(static_cast<int>(in.method),
                                                            static_cast<int>(state_bytes(problem)));
  const std::int64_t resident = warps / chosen.warps * device.multiprocessors;
  const std::int64_t tiles = in.problem.tiles;
  const std::int64_t wanted = std::clamp<std::int64_t>(
      resident / blocks, 1, std::max<std::int64_t>(tiles / kLeastTiles, 1));
  return ceil_div(tiles, ceil_div(tiles, wanted));  // none is empty
}

Buffer reads_if(std::size_t offset, const Optional& tensor) {
  return tensor ? reads(offset, *tensor) : reads(offset, 0);
}

constexpr std::size_t in_problem(std::size_t offset) { return offsetof(Args, problem) + offset; }
static_assert(offsetof(Args, problem) == offsetof(BackwardArgs, problem));

using selective_scan::Problem;
constexpr std::size_t kOffsetU = in_problem(offsetof(Problem, u));
constexpr std::size_t kOffsetDelta = in_problem(offsetof(Problem, delta));
constexpr std::size_t kOffsetZ = in_problem(offsetof(Problem, z));
constexpr std::size_t kOffsetA = in_problem(offsetof(Problem, A));
constexpr std::size_t kOffsetB = in_problem(offsetof(Problem, B));
constexpr std::size_t kOffsetC = in_problem(offsetof(Problem, C));
constexpr std::size_t kOffsetD = in_problem(offsetof(Problem, D));
constexpr std::size_t kOffsetBias = in_problem(offsetof(Problem, delta_bias));

void launch_forward(const CudaPlace& place, const ScanPlan& p, const Args& args, bool summarises,
                    const Buffer& summaries) {
  const ScanInputs& in = p.inputs;
  const auto output = [&](std::size_t offset, const Tensor& tensor) {
    return !summarises && tensor.numel() > 0 ? writes(offset, tensor) : unused(offset);
  };
  // Nobody begins with a summary of the last split.
  const std::int64_t splits = summarises ? args.splits - 1 : args.splits;
  forward_kernel.run(
      place, statics_of(in, summarises), sizes_of(in, splits, 0), args,
      {reads(kOffsetU, in.u), reads(kOffsetDelta, in.delta), reads_if(kOffsetZ, in.z),
       reads(kOffsetA, in.A), reads(kOffsetB, in.B), reads(kOffsetC, in.C),
       reads_if(kOffsetD, in.D), reads_if(kOffsetBias, in.delta_bias),
       reads_if(offsetof(Args, initial_state), p.initial_state), output(offsetof(Args, out), p.out),
       output(offsetof(Args, last_state), p.last_state),
       output(offsetof(Args, checkpoints), p.checkpoints), summaries});
}

Outputs cuda(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
             const Tensor& C, const Optional& D, const Optional& z, const Optional& delta_bias,
             bool delta_softplus, std::int64_t method, const Optional& initial_state, bool reverse,
             bool with_checkpoints, bool /* deterministic */) {
  const ScanPlan p = plan_forward(
      plan_inputs(u, delta, A, B, C, D, z, delta_bias, {delta_softplus, method, reverse}),
      initial_state, with_checkpoints);
  if (p.inputs.is_empty()) {
    pass_state(p);
    return {p.out, p.last_state, p.checkpoints};
  }
  const CudaPlace place(u);
  Args args = p.args;
  args.splits = static_cast<i32>(splits_of(p.inputs, place.facts()));
  constexpr std::size_t kSummaries = offsetof(Args, summaries);
  if (args.splits == 1) {
    launch_forward(place, p, args, false, unused(kSummaries));
    return {p.out, p.last_state, p.checkpoints};
  }
  const Tensor summaries = empty(u, p.inputs.wide(), {args.splits - 1, 2 * p.last_state.numel()});
  args.summaries = summaries.mutable_data_ptr();
  launch_forward(place, p, args, true, scratch(kSummaries, summaries));
  launch_forward(place, p, args, false, reads(kSummaries, summaries));
  return {p.out, p.last_state, p.checkpoints};
}

// Summaries first where positions are split, then the gradients.
void launch_backward(const CudaPlace& place, ScanBackwardPlan& p, const ScanSums& sums,
                     std::int64_t parts) {
  const ScanInputs& in = p.inputs;
  const Sizes sizes = sizes_of(in, p.args.splits, parts);
  const auto output = [](std::size_t offset, const Tensor& tensor) {
    return tensor.numel() > 0 ? writes(offset, tensor) : unused(offset);
  };
  const auto matrix = [&](std::size_t offset, const Tensor& tensor, bool constant) {
    return constant ? writes(offset, tensor) : updates(offset, tensor);
  };
  constexpr std::size_t kSums = offsetof(BackwardArgs, sums),
                        kProducts = offsetof(BackwardArgs, products),
                        kBehindLast = offsetof(BackwardArgs, behind_last);
  const std::int64_t maps = std::max<std::int64_t>(p.args.splits - 2, 0);
  const bool is_long = selective_scan::keeps_step(static_cast<int>(in.method), in.is_complex);
  const Tensor map_sums = split_states(in, maps);
  const Tensor products = is_long
                              ? empty(in.u, in.wide(), {maps, in.problem.batch * in.problem.dim})
                              : split_states(in, maps);
  const Tensor behind_last = split_states(in, p.args.splits > 1);
  p.args.sums = map_sums.mutable_data_ptr();
  p.args.products = products.mutable_data_ptr();
  p.args.behind_last = behind_last.mutable_data_ptr();
  const bool is_split = p.args.splits > 1;
  if (is_split) {
    summarise_kernel.run(place, backward_statics_of(in), sizes, p.args,
                         {reads(kOffsetU, in.u),
                          reads(kOffsetDelta, in.delta),
                          reads_if(kOffsetZ, in.z),
                          reads(kOffsetA, in.A),
                          reads(kOffsetC, in.C),
                          reads_if(kOffsetBias, in.delta_bias),
                          reads(offsetof(BackwardArgs, grad_out), p.grad_out),
                          reads_if(offsetof(BackwardArgs, grad_last_state), p.grad_last_state),
                          scratch(kBehindLast, behind_last),
                          maps > 0 ? scratch(kSums, map_sums) : unused(kSums),
                          maps > 0 ? scratch(kProducts, products) : unused(kProducts),
                          unused(kOffsetB),
                          unused(kOffsetD),
                          unused(offsetof(BackwardArgs, initial_state)),
                          unused(offsetof(BackwardArgs, checkpoints)),
                          unused(offsetof(BackwardArgs, grad_u)),
                          unused(offsetof(BackwardArgs, grad_delta)),
                          unused(offsetof(BackwardArgs, grad_z)),
                          unused(offsetof(BackwardArgs, grad_initial_state)),
                          unused(offsetof(BackwardArgs, grad_A)),
                          unused(offsetof(BackwardArgs, grad_B)),
                          unused(offsetof(BackwardArgs, grad_C)),
                          unused(offsetof(BackwardArgs, grad_D)),
                          unused(offsetof(BackwardArgs, grad_delta_bias))});
  }
  constexpr std::size_t kCheckpoints = offsetof(BackwardArgs, checkpoints);
  backward_kernel.run(
      place, backward_statics_of(in), sizes, p.args,
      {reads(kOffsetU, in.u),
       reads(kOffsetDelta, in.delta),
       reads_if(kOffsetZ, in.z),
       reads(kOffsetA, in.A),
       reads(kOffsetB, in.B),
       reads(kOffsetC, in.C),
       reads_if(kOffsetD, in.D),
       reads_if(kOffsetBias, in.delta_bias),
       reads(offsetof(BackwardArgs, grad_out), p.grad_out),
       reads_if(offsetof(BackwardArgs, grad_last_state), p.grad_last_state),
       reads_if(offsetof(BackwardArgs, initial_state), p.initial_state),
       p.checkpoints.numel() > 0 ? reads(kCheckpoints, p.checkpoints) : unused(kCheckpoints),
       is_split ? reads(kBehindLast, behind_last) : unused(kBehindLast),
       maps > 0 ? reads(kSums, map_sums) : unused(kSums),
       maps > 0 ? reads(kProducts, products) : unused(kProducts),
       writes(offsetof(BackwardArgs, grad_u), p.gradients.u),
       writes(offsetof(BackwardArgs, grad_delta), p.gradients.delta),
       output(offsetof(BackwardArgs, grad_z), p.gradients.z),
       output(offsetof(BackwardArgs, grad_initial_state), p.gradients.initial_state),
       matrix(offsetof(BackwardArgs, grad_A), sums.A, !sums.adds_A),
       output(offsetof(BackwardArgs, grad_D), sums.D),
       output(offsetof(BackwardArgs, grad_delta_bias), sums.delta_bias),
       matrix(offsetof(BackwardArgs, grad_B), sums.B, in.problem.constant_B),
       matrix(offsetof(BackwardArgs, grad_C), sums.C, in.problem.constant_C)});
}

void launch_sums(const CudaPlace& place, const ScanInputs& in, const SumArgs& args) {
  using selective_scan::Segment;
  static_assert(selective_scan::kSegments == 5);
  std::int64_t most = 0;
  for (const Segment& segment : args.segments) most = std::max<std::int64_t>(most, segment.count);
  const auto buffer_of = [&](int i, std::size_t offset, torchkiln_access access, ScalarType dtype,
                             std::int64_t count) {
    const std::int64_t bytes = count * static_cast<std::int64_t>(element_size(dtype));
    return buffer(offsetof(SumArgs, segments) + i * sizeof(Segment) + offset, access, bytes,
                  static_cast<std::int16_t>(kernel_type(dtype)));
  };
  const auto from = [&](int i) {
    const Segment& s = args.segments[i];
    return buffer_of(i, offsetof(Segment, from), TORCHKILN_READ, in.wide(), s.count * s.parts);
  };
  const auto to = [&](int i) {
    const Segment& s = args.segments[i];
    return buffer_of(i, offsetof(Segment, to), TORCHKILN_WRITE, s.narrow ? in.dtype() : in.wide(),
                     s.count);
  };
  sum_kernel.run(place, {kernel_type(in.dtype())}, {most}, args,
                 {from(0), to(0), from(1), to(1), from(2), to(2), from(3), to(3), from(4), to(4)});
}

Gradients backward_cuda(const Tensor& grad_out, const Optional& grad_last_state, const Tensor& u,
                        const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                        const Optional& D, const Optional& z, const Optional& delta_bias,
                        const Optional& initial_state, const Tensor& checkpoints,
                        bool delta_softplus, std::int64_t method, bool reverse,
                        bool deterministic) {
  ScanBackwardPlan p = plan_backward(
      plan_inputs(u, delta, A, B, C, D, z, delta_bias, {delta_softplus, method, reverse}), grad_out,
      grad_last_state, initial_state, checkpoints, true);
  if (p.inputs.is_empty()) {
    pass_gradient(p);
    return as_tuple(p.gradients);
  }
  const CudaPlace place(u);
  const std::int64_t parts = deterministic ? parts_of(p.inputs, place.facts()) : 0;
  p.args.splits = static_cast<i32>(backward_splits_of(p.inputs, place.facts()));
  const ScanSums sums = make_sums(p, parts);
  launch_backward(place, p, sums, parts);
  make_results(p);  // in the memory of what splits had to tell each other
  launch_sums(place, p.inputs, sums_of(p, sums, parts));
  return as_tuple(p.gradients);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? delta_bias=None, bool delta_softplus=False, int method=0, "
      "Tensor? initial_state=None, bool reverse=False, bool with_checkpoints=False, "
      "bool deterministic=False) -> (Tensor out, Tensor last_state, Tensor checkpoints)");
  m.def(
      "_selective_scan_backward(Tensor grad_out, Tensor? grad_last_state, Tensor u, Tensor delta, "
      "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, Tensor checkpoints, bool delta_softplus, int method, bool reverse, "
      "bool deterministic) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&cpu));
  m.impl("_selective_scan_backward", TORCH_BOX(&backward_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&cuda));
  m.impl("_selective_scan_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace torchkiln::bindings
