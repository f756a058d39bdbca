// corner_pool: schema, checks and shapes, CPU loops, launches.
// SPDX-License-Identifier: Apache-2.0
#if defined(__GNUC__) && !defined(__clang__)
// A comparison might raise a floating-point exception, and g++ keeps that, at the price of no vectors.
#pragma GCC optimize("O3", "no-trapping-math")
#endif
#include "detection/corner_pool.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "bindings/support/check.h"
#include "bindings/support/cuda.h"
#include "bindings/support/layout.h"
#include "bindings/support/parallel.h"
#include "bindings/support/tensor.h"
#include "bindings/support/turn.h"

namespace torchkiln::bindings {
namespace {

using corner_pool::Args;

constexpr const char* kOp = "corner_pool";
constexpr std::int64_t kWarp = 32, kMaxI32 = std::numeric_limits<std::int32_t>::max();

// ---- kernels ----

struct RowsStatics {
  std::int64_t scalar, backward, reverse, vector;
};
struct ColumnsStatics {
  std::int64_t scalar, index, backward, reverse, vector;
};
struct Sizes {
  std::int64_t length, lines;  // lines: rows, or vectors of columns
};
struct RowsTunables {
  std::int64_t block_size, lanes;
};
struct ColumnsTunables {
  std::int64_t segments, steps;
};

using Rows = Kernel<Args, RowsStatics, Sizes, RowsTunables>;
using Columns = Kernel<Args, ColumnsStatics, Sizes, ColumnsTunables>;

// Elements in 16 bytes.
std::int64_t row_vector(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 2 : (scalar == TORCHKILN_FLOAT ? 4 : 8);
}
// The most columns of a thread: all that it keeps of them must fit into its registers, and the backward keeps twice as much.
std::int64_t most_columns(std::int64_t scalar, bool backward) {
  return scalar == TORCHKILN_DOUBLE ? (backward ? 1 : 2) : (backward ? 2 : 4);
}

const std::vector<torchkiln_size> kSizes = {{"length", TORCHKILN_BUCKET_POW2},
                                            {"lines", TORCHKILN_BUCKET_NONE}};

const Rows rows_kernel({
    .path = "detection/corner_pool.cuh",
    .entry = "rows",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes), bools("backward"), bools("reverse"),
                ints("vector", {1, 2, 4, 8})},
    .sizes = kSizes,
    .tunables = {ints("block_size", {128, 256, 512}), ints("lanes", {8, 16, 32})},
    .defaults = {{256, 8}, {256, 16}, {256, 32}},
    .valid = [](const RowsStatics& s) { return s.vector == 1 || s.vector == row_vector(s.scalar); },
    .choose = [](const Rows::Problem& p) -> std::uint32_t {
      const std::int64_t vectors = ceil_div(p.sizes.length, p.statics.vector);
      return vectors <= 8 ? 0 : (vectors <= 16 ? 1 : 2);
    },
    .geometry =
        [](const Rows::Problem& p, const RowsTunables& t) {
          return linear(ceil_div(p.sizes.lines, t.block_size / t.lanes), t.block_size);
        },
});

const Columns columns_kernel({
    .path = "detection/corner_pool.cuh",
    .entry = "columns",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes), types("index", {TORCHKILN_I32, TORCHKILN_I64}),
                bools("backward"), bools("reverse"), ints("vector", {1, 2, 4})},
    .sizes = kSizes,
    .tunables = {ints("segments", {1, 2, 4, 8, 16}), ints("steps", {4, 8, 16})},
    .defaults = {{2, 8}, {8, 8}, {16, 8}},
    .valid =
        [](const ColumnsStatics& s) { return s.vector <= most_columns(s.scalar, s.backward != 0); },
    // What a thread keeps must fit into its registers.
    .legal = [](const Columns::Problem&,
                const ColumnsTunables& t) { return t.segments * t.steps <= 128; },
    .choose = [](const Columns::Problem& p) -> std::uint32_t {
      return p.sizes.length <= 16 ? 0 : (p.sizes.length <= 64 ? 1 : 2);
    },
    .geometry =
        [](const Columns::Problem& p, const ColumnsTunables& t) {
          return linear(ceil_div(p.sizes.lines, kWarp), t.segments * kWarp);
        },
});

// ---- checks and shapes ----

// The kernel arguments, and the tensors that keep their pointers alive.
struct Plan {
  Tensor input, pooled, grad_output, out;
  bool backward, reverse;  // reverse: the scan of this pass starts at the end
  Args args;
};

void check(const Tensor& input, std::int64_t mode) {
  check_floating(kOp, "input", input);
  check_dim(kOp, "input", input, 4, "(N, C, H, W)");
  if (mode < corner_pool::kTop || mode > corner_pool::kRight) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "mode", "be 0 (top), 1 (bottom), 2 (left) or 3 (right)",
         std::to_string(mode));
  }
}

std::array<std::int64_t, 4> sizes_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

// Fills in the sizes that both passes share. Rows of the map go through memory one after the other in either layout.
void set_sizes(Plan& p, std::int64_t mode, bool channels_last) {
  const auto [n, c, h, w] = sizes_of(p.input);
  const std::int64_t cell = channels_last ? c : 1, maps = channels_last ? n : n * c;
  const bool vertical = mode == corner_pool::kTop || mode == corner_pool::kBottom;
  p.args.outer = vertical ? maps : maps * h;
  p.args.length = vertical ? h : w;
  p.args.inner = vertical ? w * cell : cell;
  const bool from_end = mode == corner_pool::kTop || mode == corner_pool::kLeft;
  p.reverse = from_end != p.backward;
}

Plan plan(const Tensor& input, std::int64_t mode) {
  check(input, mode);
  const bool channels_last = is_channels_last(input);
  Plan p{.input = as_layout(input, channels_last),
         .pooled = {},
         .grad_output = {},
         .out = empty_layout(input, input.scalar_type(), sizes_of(input), channels_last),
         .backward = false,
         .reverse = false,
         .args = {}};
  p.args.input = p.input.const_data_ptr();
  p.args.out = p.out.mutable_data_ptr();
  set_sizes(p, mode, channels_last);
  return p;
}

Plan plan_backward(const Tensor& grad_output, const Tensor& input, const Tensor& pooled,
                   std::int64_t mode) {
  check(input, mode);
  const auto [n, c, h, w] = sizes_of(input);
  for (const auto& [name, tensor] :
       {std::pair{"grad_output", &grad_output}, std::pair{"pooled", &pooled}}) {
    check_same_dtype(kOp, name, *tensor, "input", input);
    check_same_device(kOp, name, *tensor, "input", input);
    check_shape(kOp, name, *tensor, {n, c, h, w});
  }
  const bool channels_last = is_channels_last(input);
  Plan p{.input = as_layout(input, channels_last),
         .pooled = as_layout(pooled, channels_last),
         .grad_output = as_layout(grad_output, channels_last),
         .out = empty_layout(input, input.scalar_type(), sizes_of(input), channels_last),
         .backward = true,
         .reverse = false,
         .args = {}};
  p.args.input = p.input.const_data_ptr();
  p.args.pooled = p.pooled.const_data_ptr();
  p.args.grad_output = p.grad_output.const_data_ptr();
  p.args.out = p.out.mutable_data_ptr();
  set_sizes(p, mode, channels_last);
  return p;
}

// ---- CPU ----

// Neighbouring columns that one loop carries along, in the first cache. Rows become columns, a tile at a time.
constexpr std::int64_t kSpan = 256, kTile = 16;

// Neighbouring lines from `begin` on, all along the length; `running` is what they carry.
template <class Scalar, class Pass>
void scan_lines(const Args& args, bool reverse, std::int64_t begin, std::int64_t count,
                Acc<Scalar>* __restrict__ running) {
  auto* out = static_cast<Scalar*>(args.out) + begin;
  for (std::int64_t k = 0; k < args.length; ++k) {
    const std::int64_t at = (reverse ? args.length - 1 - k : k) * args.inner;
#pragma GCC unroll 1  // or it is unrolled whole where the count is known, and there is no vector
    for (std::int64_t i = 0; i < count; ++i) {
      store(out[at + i], Pass::step(running[i], Pass::template item<Scalar>(args, begin + at + i)));
    }
  }
}

// Where a tile of rows lies in a tensor.
struct TilePlace {
  std::int64_t begin, stride, rows, columns;
};

template <class T>
struct Tile {
  T at[kTile][kTile];  // a row for each column of the tensor
};

template <class Scalar, class T>
void read_tile(const void* tensor, const TilePlace& place, Tile<T>& tile) {
  const Scalar* from = static_cast<const Scalar*>(tensor) + place.begin;
  if constexpr (std::is_same_v<Scalar, float>) {
    if (place.rows == kTile && place.columns == kTile) {
      for (std::int64_t row = 0; row < kTile; row += 4) {
        for (std::int64_t c = 0; c < kTile; c += 4)
          turn_four(from + row * place.stride + c, place.stride, &tile.at[c][row], kTile);
      }
      return;
    }
  }
  for (std::int64_t row = 0; row < place.rows; ++row) {
    for (std::int64_t c = 0; c < place.columns; ++c)
      tile.at[c][row] = load(from[row * place.stride + c]);
  }
}

template <class Scalar, class T>
void write_tile(const Tile<T>& tile, const TilePlace& place, void* tensor) {
  Scalar* to = static_cast<Scalar*>(tensor) + place.begin;
  if constexpr (std::is_same_v<Scalar, float>) {
    if (place.rows == kTile && place.columns == kTile) {
      for (std::int64_t row = 0; row < kTile; row += 4) {
        for (std::int64_t c = 0; c < kTile; c += 4)
          turn_four(&tile.at[c][row], kTile, to + row * place.stride + c, place.stride);
      }
      return;
    }
  }
  for (std::int64_t row = 0; row < place.rows; ++row) {
    for (std::int64_t c = 0; c < place.columns; ++c)
      store(to[row * place.stride + c], tile.at[c][row]);
  }
}

// Up to kTile rows from `first` on.
template <class Scalar, class Pass>
void scan_tiles(const Plan& p, std::int64_t first) {
  using T = Acc<Scalar>;
  const std::int64_t length = p.args.length, tiles = ceil_div(length, kTile);
  Tile<T> input{}, pooled{}, grad_output{}, out;
  T running[kTile];
  std::fill_n(running, kTile, Pass::start());
  for (std::int64_t k = 0; k < tiles; ++k) {
    const std::int64_t column = (p.reverse ? tiles - 1 - k : k) * kTile;
    const TilePlace place = {first * length + column, length,
                             std::min<std::int64_t>(kTile, p.args.outer - first),
                             std::min(kTile, length - column)};
    read_tile<Scalar>(p.args.input, place, input);
    if (p.backward) {
      read_tile<Scalar>(p.args.pooled, place, pooled);
      read_tile<Scalar>(p.args.grad_output, place, grad_output);
    }
    const Args args = {&input, &pooled, &grad_output, &out, 1, place.columns, kTile};
    scan_lines<T, Pass>(args, p.reverse, 0, kTile, running);
    write_tile<Scalar>(out, place, p.args.out);
  }
}

template <class Scalar, class Pass>
void scan_rows(const Plan& p) {
  const std::int64_t groups = ceil_div(p.args.outer, kTile);
  parallel_for(groups, kTile * p.args.length, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) scan_tiles<Scalar, Pass>(p, i * kTile);
  });
}

template <class Scalar, class Pass>
void scan_columns(const Plan& p) {
  const std::int64_t length = p.args.length, inner = p.args.inner;
  const std::int64_t spans = ceil_div(inner, kSpan), columns = std::min(inner, kSpan);
  parallel_for(p.args.outer * spans, length * columns, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s) {
      const std::int64_t column = s % spans * kSpan;
      Acc<Scalar> running[kSpan];
      std::fill_n(running, kSpan, Pass::start());
      scan_lines<Scalar, Pass>(p.args, p.reverse, s / spans * length * inner + column,
                               std::min(kSpan, inner - column), running);
    }
  });
}

template <class Scalar, class Pass>
void scan(const Plan& p) {
  p.args.inner == 1 ? scan_rows<Scalar, Pass>(p) : scan_columns<Scalar, Pass>(p);
}

Tensor run_cpu(const Plan& p) {
  with_float(p.out.scalar_type(), [&]<class Scalar>() {
    using T = Acc<Scalar>;
    if (p.backward) {
      scan<Scalar, corner_pool::Backward<T>>(p);
    } else {
      scan<Scalar, corner_pool::Forward<T>>(p);
    }
  });
  return p.out;
}

Tensor cpu(const Tensor& input, std::int64_t mode) { return run_cpu(plan(input, mode)); }

Tensor backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& pooled,
                    std::int64_t mode) {
  return run_cpu(plan_backward(grad_output, input, pooled, mode));
}

// ---- CUDA ----

bool all_aligned(const Args& args) {
  return aligned_to_16(args.input) && aligned_to_16(args.pooled) &&
         aligned_to_16(args.grad_output) && aligned_to_16(args.out);
}

// Fewer columns a thread while these do not fill the GPU.
std::int64_t columns_of(const Device& device, const Plan& p, std::int64_t scalar) {
  if (!all_aligned(p.args)) return 1;
  std::int64_t vector = most_columns(scalar, p.backward);
  const auto blocks = [&] { return p.args.outer * (p.args.inner / vector) / kWarp; };
  while (vector > 1 && (p.args.inner % vector != 0 || blocks() < device.multiprocessors))
    vector /= 2;
  return vector;
}

void launch(const Plan& p, std::initializer_list<Buffer> buffers) {
  const std::int64_t scalar = kernel_type(p.out.scalar_type());
  const CudaPlace place(p.out);
  if (p.args.inner == 1) {
    const std::int64_t full = row_vector(scalar);
    const std::int64_t vector = p.args.length % full == 0 && all_aligned(p.args) ? full : 1;
    rows_kernel.run(place, {scalar, p.backward, p.reverse, vector}, {p.args.length, p.args.outer},
                    p.args, buffers);
    return;
  }
  const std::int64_t vector = columns_of(place.facts(), p, scalar);
  const std::int64_t lines = p.args.outer * (p.args.inner / vector);
  const std::int64_t index = lines <= kMaxI32 - kWarp ? TORCHKILN_I32 : TORCHKILN_I64;
  columns_kernel.run(place, {scalar, index, p.backward, p.reverse, vector}, {p.args.length, lines},
                     p.args, buffers);
}

Tensor cuda(const Tensor& input, std::int64_t mode) {
  const Plan p = plan(input, mode);
  if (p.out.numel() == 0) return p.out;
  launch(p, {reads(offsetof(Args, input), p.input), writes(offsetof(Args, out), p.out)});
  return p.out;
}

Tensor backward_cuda(const Tensor& grad_output, const Tensor& input, const Tensor& pooled,
                     std::int64_t mode) {
  const Plan p = plan_backward(grad_output, input, pooled, mode);
  if (p.out.numel() == 0) return p.out;
  launch(p,
         {reads(offsetof(Args, input), p.input), reads(offsetof(Args, pooled), p.pooled),
          reads(offsetof(Args, grad_output), p.grad_output), writes(offsetof(Args, out), p.out)});
  return p.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def("corner_pool(Tensor input, int mode) -> Tensor");
  m.def(
      "_corner_pool_backward(Tensor grad_output, Tensor input, Tensor pooled, int mode) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("corner_pool", TORCH_BOX(&cpu));
  m.impl("_corner_pool_backward", TORCH_BOX(&backward_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("corner_pool", TORCH_BOX(&cuda));
  m.impl("_corner_pool_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace torchkiln::bindings
