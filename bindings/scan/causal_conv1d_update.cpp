// causal_conv1d_update: schema, checks and shapes, CPU loop, launch.
// SPDX-License-Identifier: Apache-2.0
#include "scan/causal_conv1d_update.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "bindings/scan/parameters.h"
#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"

namespace torchkiln::bindings {
namespace {

using causal_conv1d_update::Args;
using causal_conv1d_update::kMaxWidth;
using causal_conv1d_update::Step;
using causal_conv1d_update::Strides;
using Optional = std::optional<Tensor>;

constexpr const char* kOp = "causal_conv1d_update";

// ---- kernels ----

struct Statics {
  std::int64_t scalar, width;
};
struct Sizes {
  std::int64_t sequences, channels;
};
struct Tunables {
  std::int64_t block_size;
};
using Update = Kernel<Args, Statics, Sizes, Tunables>;

std::int64_t bytes_of(const Statics& s) {
  if (s.scalar == TORCHKILN_DOUBLE) return 8;
  return s.scalar == TORCHKILN_FLOAT ? 4 : 2;
}
// Channels of a thread where states lie in rows.
std::int64_t channels_at_once(const Statics& s) {
  return causal_conv1d_update::channels_at_once(static_cast<int>(s.width),
                                                static_cast<int>(bytes_of(s)));
}

template <bool kRows>
std::int64_t threads_of(const Update::Problem& p) {
  return kRows ? p.sizes.channels / channels_at_once(p.statics) : p.sizes.channels;
}

template <bool kRows>
Update update_with(const char* entry) {
  return Update({
      .path = "scan/causal_conv1d_update.cuh",
      .entry = entry,
      .operators = {kOp},
      .statics = {types("scalar", kFloatTypes),
                  kRows ? ints("width", {2, 4}) : ints("width", {2, 3, 4})},
      .sizes = {{"sequences", TORCHKILN_BUCKET_POW2}, {"channels", TORCHKILN_BUCKET_POW2}},
      .tunables = {ints("block_size", {32, 64, 128, 256})},
      .defaults = {{64}, {128}},
      .valid = [](const Statics& s) { return !kRows || channels_at_once(s) > 0; },
      .choose = [](const Update::Problem& p) -> std::uint32_t {
        return p.sizes.sequences * threads_of<kRows>(p) <= 128 * p.device.multiprocessors ? 0 : 1;
      },
      .geometry =
          [](const Update::Problem& p, const Tunables& t) {
            return by_sequence(ceil_div(threads_of<kRows>(p), t.block_size), p.sizes.sequences,
                               t.block_size);
          },
  });
}
const Update update_kernel = update_with<false>("update");
const Update rows_kernel = update_with<true>("update_rows");

// ---- checks and shapes ----

struct Plan {
  Tensor x, state, weight, out;
  Optional bias, seqlens, indices;
  Args args;
};

Strides strides_of(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

void check_state(const Tensor& state, const Tensor& x, std::int64_t width, bool has_indices) {
  check_same_dtype(kOp, "conv_state", state, "x", x);
  check_same_device(kOp, "conv_state", state, "x", x);
  check_dim(kOp, "conv_state", state, 3, "(B, D, S)");
  check_shape(kOp, "conv_state", state,
              {has_indices ? state.size(0) : x.size(0), x.size(1), state.size(2)});
  if (state.size(2) < width - 1) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "conv_state",
         "hold at least the " + std::to_string(width - 1) + " inputs that the weight reaches back",
         text(state));
  }
  check_own_memory(kOp, "conv_state", state);
}

Plan plan(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const Optional& bias,
          const Optional& cache_seqlens, const Optional& conv_state_indices, bool silu) {
  check_floating(kOp, "x", x);
  check_dim(kOp, "x", x, 3, "(B, D) or (B, D, L)");
  check_parameter(kOp, "weight", weight, x);
  check_dim(kOp, "weight", weight, 2, "(D, width)");
  const std::int64_t width = weight.size(1);
  if (width < 1 || width > kMaxWidth) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "weight",
         "have a width from 1 to " + std::to_string(kMaxWidth), std::to_string(width));
  }
  check_shape(kOp, "weight", weight, {x.size(1), width});
  if (bias) {
    check_parameter(kOp, "bias", *bias, x);
    check_shape(kOp, "bias", *bias, {x.size(1)});
  }
  if (cache_seqlens) check_numbers(kOp, "cache_seqlens", *cache_seqlens, x);
  if (conv_state_indices) check_numbers(kOp, "conv_state_indices", *conv_state_indices, x);
  check_state(conv_state, x, width, conv_state_indices.has_value());
  const auto contiguous = [](const Optional& tensor) {
    return tensor ? Optional(as_contiguous(*tensor)) : std::nullopt;
  };
  Plan p{.x = x,
         .state = conv_state,
         .weight = as_contiguous(weight),
         .out = empty(x, x.scalar_type(), shape_of(x)),
         .bias = contiguous(bias),
         .seqlens = contiguous(cache_seqlens),
         .indices = contiguous(conv_state_indices),
         .args = {}};
  const auto pointer = [](const Optional& tensor) {
    return tensor ? tensor->const_data_ptr() : nullptr;
  };
  p.args = {.x = p.x.const_data_ptr(),
            .state = p.state.mutable_data_ptr(),
            .weight = p.weight.const_data_ptr(),
            .bias = pointer(p.bias),
            .cache_seqlens = pointer(p.seqlens),
            .indices = pointer(p.indices),
            .out = p.out.mutable_data_ptr(),
            .x_strides = strides_of(p.x),
            .state_strides = strides_of(p.state),
            .batch = x.size(0),
            .channels = x.size(1),
            .length = x.size(2),
            .rows = conv_state.size(0),
            .state_length = conv_state.size(2),
            .width = static_cast<i32>(width),
            .silu = silu,
            .weight_is_float = weight.scalar_type() == ScalarType::Float,
            .bias_is_float = bias && bias->scalar_type() == ScalarType::Float};
  return p;
}

// ---- CPU ----

void check_rows(const Plan& p) {
  if (!p.indices) return;
  const auto* rows = data<std::int32_t>(*p.indices);
  for (std::int64_t b = 0; b < p.args.batch; ++b) {
    if (rows[b] < p.args.rows) continue;
    fail(TORCHKILN_ERROR_INDEX, kOp, "conv_state_indices",
         "be below the number of states (" + std::to_string(p.args.rows) + ")",
         std::to_string(rows[b]));
  }
}

Tensor cpu(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const Optional& bias,
           const Optional& cache_seqlens, const Optional& conv_state_indices, bool silu) {
  const Plan p = plan(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu);
  check_rows(p);
  const std::int64_t lines = p.args.batch * p.args.channels;
  with_float(x.scalar_type(), [&]<class Scalar>() {
    parallel_for(lines, 8 * p.args.length * p.args.width + p.args.state_length,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t i = begin; i < end; ++i)
                     Step<Scalar, 0>(p.args, i / p.args.channels, i % p.args.channels).run();
                 });
  });
  return p.out;
}

// ---- CUDA ----

bool is_aligned(const Tensor& tensor, std::int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr()) %
             static_cast<std::uint64_t>(bytes) ==
         0;
}

// What update_rows asks for.
bool is_in_rows(const Plan& p, const Statics& s) {
  const Args& a = p.args;
  if ((s.width != 2 && s.width != 4) || a.length != 1 || a.state_length != s.width || p.seqlens)
    return false;
  const std::int64_t together = channels_at_once(s);
  return together > 0 && a.channels % together == 0 && a.state_strides.length == 1 &&
         a.state_strides.channel == s.width && a.state_strides.batch % (together * s.width) == 0 &&
         a.x_strides.channel == 1 && a.x_strides.batch % together == 0 && is_aligned(p.state, 16) &&
         is_aligned(p.weight, 16) && is_aligned(p.x, together * bytes_of(s));
}

Tensor cuda(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const Optional& bias,
            const Optional& cache_seqlens, const Optional& conv_state_indices, bool silu) {
  const Plan p = plan(x, conv_state, weight, bias, cache_seqlens, conv_state_indices, silu);
  if (p.out.numel() == 0) return p.out;
  const CudaPlace place(x);
  const auto reads_if = [](std::size_t offset, const Optional& tensor) {
    return tensor ? reads(offset, *tensor) : unused(offset);
  };
  const Statics statics = {kernel_type(x.scalar_type()), p.args.width};
  const Update& kernel = is_in_rows(p, statics) ? rows_kernel : update_kernel;
  kernel.run(place, statics, {p.args.batch, p.args.channels}, p.args,
             {reads(offsetof(Args, x), p.x), updates(offsetof(Args, state), p.state),
              reads(offsetof(Args, weight), p.weight), reads_if(offsetof(Args, bias), p.bias),
              reads_if(offsetof(Args, cache_seqlens), p.seqlens),
              reads_if(offsetof(Args, indices), p.indices), writes(offsetof(Args, out), p.out)});
  return p.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias=None, "
      "Tensor? cache_seqlens=None, Tensor? conv_state_indices=None, bool silu=False) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) { m.impl("causal_conv1d_update", TORCH_BOX(&cpu)); }
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) { m.impl("causal_conv1d_update", TORCH_BOX(&cuda)); }

}  // namespace torchkiln::bindings
