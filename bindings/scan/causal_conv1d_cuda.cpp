// causal_conv1d on CUDA: kernels and launches.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "bindings/scan/causal_conv1d.h"
#include "bindings/support/cuda.h"

namespace torchkiln::bindings::causal_conv1d {
namespace {

using torchkiln::causal_conv1d::Strides;

constexpr std::int64_t kWarp = 32;

struct Statics {
  std::int64_t scalar, width, sequences, vector;
};
struct Sizes {
  std::int64_t length, lines;  // lines: rows, or vectors of channels
};
struct BackwardSizes {
  std::int64_t lines, slabs;
};
struct RowsTunables {
  std::int64_t block_size, lanes, items;
};
struct ColumnsTunables {
  std::int64_t block_size, steps;
};
struct BlockSize {
  std::int64_t block_size;
};
struct TilesTunables {
  std::int64_t block_size, tiles;
};
struct SegmentsTunables {
  std::int64_t segments, steps;
};
struct ScalarStatics {
  std::int64_t scalar;
};
struct Count {
  std::int64_t count;
};

using ForwardRows = Kernel<Args, Statics, Sizes, RowsTunables>;
using ForwardColumns = Kernel<Args, Statics, Sizes, ColumnsTunables>;
using BackwardRows = Kernel<Args, Statics, BackwardSizes, TilesTunables>;
using BackwardColumns = Kernel<Args, Statics, BackwardSizes, SegmentsTunables>;
using Elements = Kernel<Args, ScalarStatics, Count, BlockSize>;

// Elements in 16 bytes.
std::int64_t row_vector(std::int64_t scalar) {
  return scalar == TORCHKILN_DOUBLE ? 2 : (scalar == TORCHKILN_FLOAT ? 4 : 8);
}
// The windows of so many channels fit into a thread's registers.
std::int64_t column_vector(std::int64_t scalar) { return scalar == TORCHKILN_DOUBLE ? 2 : 4; }
constexpr std::int64_t kBackwardColumnVector = 2;

bool has_row_vector(const Statics& s) { return s.vector == 1 || s.vector == row_vector(s.scalar); }
bool has_column_vector(const Statics& s) {
  return s.vector == 1 || s.vector == column_vector(s.scalar);
}
bool has_backward_column_vector(const Statics& s) {
  return s.vector == 1 || s.vector == kBackwardColumnVector;
}

// Other widths than the usual ones are compiled when they are met.
const std::vector<Parameter> kStatics = {types("scalar", kFloatTypes), ints("width", {2, 3, 4}),
                                         bools("sequences"), ints("vector", {1, 2, 4, 8})};
const std::vector<Parameter> kColumnStatics = {types("scalar", kFloatTypes),
                                               ints("width", {2, 3, 4}), bools("sequences"),
                                               ints("vector", {1, 2, 4})};
const std::vector<torchkiln_size> kSizes = {{"length", TORCHKILN_BUCKET_POW2},
                                            {"lines", TORCHKILN_BUCKET_NONE}};
const std::vector<torchkiln_size> kBackwardSizes = {{"lines", TORCHKILN_BUCKET_NONE},
                                                    {"slabs", TORCHKILN_BUCKET_NONE}};

const ForwardRows forward_rows({
    .path = "scan/causal_conv1d.cuh",
    .entry = "forward_rows",
    .operators = {kOp},
    .statics = kStatics,
    .sizes = kSizes,
    .tunables = {ints("block_size", {128, 256}), ints("lanes", {8, 32}),
                 ints("items", {1, 2, 4, 8})},
    .defaults = {{128, 32, 4}, {128, 8, 1}, {128, 32, 2}},
    .valid = &has_row_vector,
    // Fewer items where there are few threads of four; in float32 they are faster in any case.
    .choose = [](const ForwardRows::Problem& p) -> std::uint32_t {
      if (p.sizes.length <= 16 * p.statics.vector) return 1;
      const std::int64_t warps = p.sizes.lines * ceil_div(p.sizes.length, 128 * p.statics.vector);
      return p.statics.scalar == TORCHKILN_FLOAT || warps < 64 * p.device.multiprocessors ? 2 : 0;
    },
    .geometry =
        [](const ForwardRows::Problem& p, const RowsTunables& t) {
          const std::int64_t spans = ceil_div(p.sizes.length, t.lanes * t.items * p.statics.vector);
          return linear(ceil_div(p.sizes.lines * spans, t.block_size / t.lanes), t.block_size);
        },
});

const ForwardColumns forward_columns({
    .path = "scan/causal_conv1d.cuh",
    .entry = "forward_columns",
    .operators = {kOp},
    .statics = kColumnStatics,
    .sizes = kSizes,
    .tunables = {ints("block_size", {64, 128, 256}), ints("steps", {4, 8, 16, 32})},
    .defaults = {{128, 16}, {128, 4}},
    .valid = &has_column_vector,
    // Short walks where there are few of them.
    .choose = [](const ForwardColumns::Problem& p) -> std::uint32_t {
      return p.sizes.lines * ceil_div(p.sizes.length, 16) < 1024 * p.device.multiprocessors ? 1 : 0;
    },
    .geometry =
        [](const ForwardColumns::Problem& p, const ColumnsTunables& t) {
          const std::int64_t threads = p.sizes.lines * ceil_div(p.sizes.length, t.steps);
          return linear(ceil_div(threads, t.block_size), t.block_size);
        },
});

const BackwardRows backward_rows({
    .path = "scan/causal_conv1d.cuh",
    .entry = "backward_rows",
    .operators = {kOp},
    .statics = kStatics,
    .sizes = kBackwardSizes,
    .tunables = {ints("block_size", {64, 128, 256}), ints("tiles", {4, 8, 16})},
    .defaults = {{128, 16}, {64, 8}},
    .valid = &has_row_vector,
    // A tile of a half type is twice as long.
    .choose = [](const BackwardRows::Problem& p) -> std::uint32_t {
      return p.statics.scalar == TORCHKILN_HALF || p.statics.scalar == TORCHKILN_BFLOAT16 ? 1 : 0;
    },
    .geometry =
        [](const BackwardRows::Problem& p, const TilesTunables& t) {
          Geometry geometry = linear(p.sizes.lines, t.block_size);
          geometry.grid[1] = static_cast<std::uint32_t>(p.sizes.slabs);
          return geometry;
        },
});

const BackwardColumns backward_columns({
    .path = "scan/causal_conv1d.cuh",
    .entry = "backward_columns",
    .operators = {kOp},
    .statics = kColumnStatics,
    .sizes = kBackwardSizes,
    .tunables = {ints("segments", {2, 4, 8}), ints("steps", {16, 32, 64})},
    .defaults = {{4, 32}},
    .valid = &has_backward_column_vector,
    .geometry =
        [](const BackwardColumns::Problem& p, const SegmentsTunables& t) {
          Geometry geometry = linear(ceil_div(p.sizes.lines, kWarp), t.segments * kWarp);
          geometry.grid[1] = static_cast<std::uint32_t>(p.sizes.slabs);
          return geometry;
        },
});

Geometry elements_geometry(const Elements::Problem& p, const BlockSize& t) {
  return linear(ceil_div(p.sizes.count, t.block_size), t.block_size);
}

const Elements finish({
    .path = "scan/causal_conv1d.cuh",
    .entry = "finish",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {{"count", TORCHKILN_BUCKET_NONE}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}},
    .geometry =
        [](const Elements::Problem& p, const BlockSize& t) {
          return linear(ceil_div(p.sizes.count, kWarp), t.block_size);
        },
});

const Elements initial({
    .path = "scan/causal_conv1d.cuh",
    .entry = "initial",
    .operators = {kOp},
    .statics = {types("scalar", kFloatTypes)},
    .sizes = {{"count", TORCHKILN_BUCKET_NONE}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}},
    .geometry = &elements_geometry,
});

// May `vector` neighbours be read at once, wherever they begin?
bool fits(const void* pointer, const Strides& s, bool columns, std::int64_t vector,
          std::uint64_t bytes) {
  const std::int64_t across = columns ? s.length : s.channel;
  return s.batch % vector == 0 && across % vector == 0 &&
         reinterpret_cast<std::uintptr_t>(pointer) % (static_cast<std::uint64_t>(vector) * bytes) ==
             0;
}

Statics statics_of(const Plan& p, std::int64_t of_columns) {
  const std::int64_t scalar = kernel_type(p.x.scalar_type());
  const std::int64_t along = p.columns ? p.args.channels : p.args.length;
  std::int64_t vector = p.columns ? of_columns : row_vector(scalar);
  // Wide filters keep more in registers.
  if (p.width() > 4 && p.columns) vector = 1;
  const std::uint64_t bytes = element_size(p.x.scalar_type());
  const bool all = along % vector == 0 &&
                   fits(p.args.x, p.args.x_strides, p.columns, vector, bytes) &&
                   fits(p.args.out, p.args.out_strides, p.columns, vector, bytes) &&
                   fits(p.args.grad_out, p.args.grad_strides, p.columns, vector, bytes);
  return {scalar, p.width(), p.seq_idx.has_value(), all ? vector : 1};
}

// Rows, or vectors of channels at one position.
std::int64_t lines_of(const Plan& p, const Statics& s) {
  return p.columns ? p.args.batch * (p.args.channels / s.vector) : p.args.batch * p.args.channels;
}

Buffer reads_if(std::size_t offset, const Optional& tensor) {
  return tensor && tensor->numel() > 0 ? reads(offset, *tensor) : unused(offset);
}

// Enough blocks to fill the GPU twice, none with less than some work; a power of two, which divides most lengths.
std::int64_t slabs_of(const Device& device, std::int64_t blocks, std::int64_t pieces) {
  const auto least = static_cast<std::uint64_t>(ceil_div(16 * device.multiprocessors, blocks));
  const auto wanted = static_cast<std::int64_t>(std::bit_ceil(least));
  return std::clamp<std::int64_t>(std::min(wanted, pieces), 1, 1024);
}

void finish_sums(const CudaPlace& place, const Plan& p, std::int64_t scalar) {
  finish.run(
      place, {scalar}, {p.args.channels * (p.width() + 1)}, p.args,
      {unused(offsetof(Args, x)), unused(offsetof(Args, weight)), unused(offsetof(Args, bias)),
       unused(offsetof(Args, seq_idx)), unused(offsetof(Args, initial)),
       unused(offsetof(Args, grad_out)), unused(offsetof(Args, out)),
       reads(offsetof(Args, partials), *p.partials), unused(offsetof(Args, grad_initial)),
       writes(offsetof(Args, grad_weight), *p.grad_weight),
       p.grad_bias ? writes(offsetof(Args, grad_bias), *p.grad_bias)
                   : unused(offsetof(Args, grad_bias))});
}

void run_initial(const CudaPlace& place, const Plan& p, std::int64_t scalar) {
  initial.run(
      place, {scalar}, {p.grad_initial->numel()}, p.args,
      {reads(offsetof(Args, x), p.x), reads(offsetof(Args, weight), p.weight),
       reads_if(offsetof(Args, bias), p.bias), reads_if(offsetof(Args, seq_idx), p.seq_idx),
       reads_if(offsetof(Args, initial), p.initial), reads_if(offsetof(Args, grad_out), p.grad_out),
       unused(offsetof(Args, out)), unused(offsetof(Args, partials)),
       writes(offsetof(Args, grad_initial), *p.grad_initial), unused(offsetof(Args, grad_weight)),
       unused(offsetof(Args, grad_bias))});
}

}  // namespace

Tensor forward_cuda(const Plan& p) {
  if (p.numel() == 0) return p.out;
  const CudaPlace place(p.x);
  const Statics s = statics_of(p, column_vector(kernel_type(p.x.scalar_type())));
  const Sizes sizes = {p.args.length, lines_of(p, s)};
  const std::initializer_list<Buffer> buffers = {reads(offsetof(Args, x), p.x),
                                                 reads(offsetof(Args, weight), p.weight),
                                                 reads_if(offsetof(Args, bias), p.bias),
                                                 reads_if(offsetof(Args, seq_idx), p.seq_idx),
                                                 reads_if(offsetof(Args, initial), p.initial),
                                                 unused(offsetof(Args, grad_out)),
                                                 writes(offsetof(Args, out), p.out),
                                                 unused(offsetof(Args, partials)),
                                                 unused(offsetof(Args, grad_initial)),
                                                 unused(offsetof(Args, grad_weight)),
                                                 unused(offsetof(Args, grad_bias))};
  if (p.columns) {
    forward_columns.run(place, s, sizes, p.args, buffers);
  } else {
    forward_rows.run(place, s, sizes, p.args, buffers);
  }
  return p.out;
}

void backward_cuda(Plan& p) {
  const CudaPlace place(p.x);
  const Statics s = statics_of(p, kBackwardColumnVector);
  const std::int64_t lines = p.columns ? p.args.channels / s.vector : p.args.channels;
  p.args.slabs = p.columns ? slabs_of(place.facts(), ceil_div(lines, kWarp),
                                      p.args.batch * ceil_div(p.args.length, 128))
                           : slabs_of(place.facts(), lines,
                                      ceil_div(p.args.batch * p.args.length, 1024 * s.vector));
  const ScalarType sums =
      p.x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  p.partials = empty(p.x, sums, {p.args.slabs, p.args.channels, p.width() + 1});
  p.args.partials = p.partials->mutable_data_ptr();
  const std::initializer_list<Buffer> buffers = {reads(offsetof(Args, x), p.x),
                                                 reads(offsetof(Args, weight), p.weight),
                                                 reads_if(offsetof(Args, bias), p.bias),
                                                 reads_if(offsetof(Args, seq_idx), p.seq_idx),
                                                 reads_if(offsetof(Args, initial), p.initial),
                                                 reads_if(offsetof(Args, grad_out), p.grad_out),
                                                 writes(offsetof(Args, out), p.out),
                                                 scratch(offsetof(Args, partials), *p.partials),
                                                 unused(offsetof(Args, grad_initial)),
                                                 unused(offsetof(Args, grad_weight)),
                                                 unused(offsetof(Args, grad_bias))};
  if (p.columns) {
    backward_columns.run(place, s, {lines, p.args.slabs}, p.args, buffers);
  } else {
    backward_rows.run(place, s, {lines, p.args.slabs}, p.args, buffers);
  }
  finish_sums(place, p, s.scalar);
  if (p.args.grad_initial != nullptr) run_initial(place, p, s.scalar);
}

}  // namespace torchkiln::bindings::causal_conv1d
