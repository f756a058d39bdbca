// corner_pool: schema, checks and shapes, CPU loops, launches.
// SPDX-License-Identifier: Apache-2.0
#if defined(__GNUC__) && !defined(__clang__)
// A comparison might raise a floating-point exception, and g++ keeps that, at the price of no vectors; so are two steps of
// a scan that it merges into one loop.
#pragma GCC optimize("O3", "no-trapping-math", "no-loop-unroll-and-jam")
#endif
#include "detection/corner_pool.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <memory>
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

// Neighbouring columns, or rows, that are scanned side by side; rows are turned into columns a tile at a time.
constexpr std::int64_t kSpan = 128, kRows = 32, kTile = 16;
// Lines of a map that are read ahead: towards its beginning processors do not do that well themselves.
constexpr std::int64_t kAhead = 16;
// Maxima of a block that a thread keeps.
constexpr std::int64_t kMostMarks = 1 << 20;

// Everything is inlined into each body.
#define TORCHKILN_POOL_LOOPS __attribute__((flatten, TORCHKILN_CLONES))

// Steps of n scans side by side. The gradient of lines that are not too long does not read the forward's output: to find the
// maxima anew costs less than to move it through memory.
template <class Scalar, class T>
inline void pool_step(const Scalar* x, T* running, Scalar* out, std::int64_t n) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    store(out[i], corner_pool::Forward<T>::step(running[i], {load(x[i])}));
  }
}
template <class Scalar, class T>
inline void mark_step(const Scalar* x, T* running, std::int32_t* maxima, std::int64_t n) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    const T value = load(x[i]);
    const bool takes = corner_pool::Forward<T>::takes(running[i], value);
    running[i] = takes ? value : running[i];
    maxima[i] = takes;
  }
}
template <class Scalar, class T>
inline void sum_step(const Scalar* gradient, const std::int32_t* maxima, T* running, Scalar* out,
                     std::int64_t n) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    store(out[i], corner_pool::Backward<T>::step(running[i], {load(gradient[i]), maxima[i] != 0}));
  }
}

// Lines that are scanned together: where the first one starts, and how many there are.
struct Block {
  std::int64_t begin, count;
};

// f(k) for all k in [0, n).
template <class F>
inline void in_direction(bool reverse, std::int64_t n, const F& f) {
  for (std::int64_t k = 0; k < n; ++k) f(reverse ? n - 1 - k : k);
}

// Columns. f(at, k): the line k of the block begins at `at`; each of `tensors` is read ahead.
template <class Scalar, class F>
inline void for_lines(const Args& args, const Block& block, bool reverse,
                      std::initializer_list<const void*> tensors, const F& f) {
  constexpr auto kLine = static_cast<std::int64_t>(64 / sizeof(Scalar));
  in_direction(reverse, args.length, [&](std::int64_t k) {
    const std::int64_t ahead =
        std::clamp<std::int64_t>(reverse ? k - kAhead : k + kAhead, 0, args.length - 1);
    for (const void* tensor : tensors) {
      const auto* line = static_cast<const Scalar*>(tensor) + block.begin + ahead * args.inner;
      for (std::int64_t i = 0; i < block.count; i += kLine) __builtin_prefetch(line + i);
    }
    f(block.begin + k * args.inner, k);
  });
}

template <class Scalar>
inline void pool_columns(const Plan& p, const Block& block) {
  using T = Acc<Scalar>;
  T running[kSpan];
  std::fill_n(running, kSpan, corner_pool::Forward<T>::start());
  const auto* input = static_cast<const Scalar*>(p.args.input);
  auto* out = static_cast<Scalar*>(p.args.out);
  for_lines<Scalar>(p.args, block, p.reverse, {input, out}, [&](std::int64_t at, std::int64_t) {
    pool_step(input + at, running, out + at, block.count);
  });
}

template <class Scalar>
inline void sum_columns(const Plan& p, const Block& block, std::int32_t* maxima) {
  using T = Acc<Scalar>;
  T running[kSpan];
  std::fill_n(running, kSpan, corner_pool::Forward<T>::start());
  const auto* input = static_cast<const Scalar*>(p.args.input);
  for_lines<Scalar>(p.args, block, !p.reverse, {input}, [&](std::int64_t at, std::int64_t k) {
    mark_step(input + at, running, maxima + k * kSpan, block.count);
  });
  std::fill_n(running, kSpan, corner_pool::Backward<T>::start());
  const auto* grad = static_cast<const Scalar*>(p.args.grad_output);
  auto* out = static_cast<Scalar*>(p.args.out);
  for_lines<Scalar>(p.args, block, p.reverse, {grad, out}, [&](std::int64_t at, std::int64_t k) {
    sum_step(grad + at, maxima + k * kSpan, running, out + at, block.count);
  });
}

// Columns of kRows rows.
template <class T>
struct Tile {
  T at[kTile][kRows];
};

// Where a tile lies in a tensor.
struct TilePlace {
  std::int64_t begin, stride, rows, columns;
  bool is_full() const { return rows == kRows && columns == kTile; }
};

// Number by number, once for all bodies.
template <class Scalar, class T>
[[gnu::noinline]] void read_numbers(const Scalar* from, const TilePlace& place, Tile<T>& tile) {
  for (std::int64_t row = 0; row < place.rows; ++row) {
    for (std::int64_t c = 0; c < place.columns; ++c)
      tile.at[c][row] = load(from[row * place.stride + c]);
  }
}
template <class Scalar, class T>
[[gnu::noinline]] void write_numbers(const Tile<T>& tile, const TilePlace& place, Scalar* to) {
  for (std::int64_t row = 0; row < place.rows; ++row) {
    for (std::int64_t c = 0; c < place.columns; ++c)
      store(to[row * place.stride + c], tile.at[c][row]);
  }
}

template <class Scalar, class T>
inline void read_tile(const void* tensor, const TilePlace& place, Tile<T>& tile) {
  const Scalar* from = static_cast<const Scalar*>(tensor) + place.begin;
  if constexpr (std::is_same_v<Scalar, T>) {
    if (place.is_full()) {
      for (std::int64_t row = 0; row < kRows; row += 4) {
        for (std::int64_t c = 0; c < kTile; c += 4)
          turn_four(from + row * place.stride + c, place.stride, &tile.at[c][row], kRows);
      }
      return;
    }
  }
  read_numbers(from, place, tile);
}

template <class Scalar, class T>
inline void write_tile(const Tile<T>& tile, const TilePlace& place, void* tensor) {
  Scalar* to = static_cast<Scalar*>(tensor) + place.begin;
  if constexpr (std::is_same_v<Scalar, T>) {
    if (place.is_full()) {
      for (std::int64_t row = 0; row < kRows; row += 4) {
        for (std::int64_t c = 0; c < kTile; c += 4)
          turn_four(&tile.at[c][row], kRows, to + row * place.stride + c, place.stride);
      }
      return;
    }
  }
  write_numbers(tile, place, to);
}

// f(place, column): the tile there starts with this column of the block.
template <class F>
inline void for_tiles(const Args& args, const Block& block, bool reverse, const F& f) {
  in_direction(reverse, ceil_div(args.length, kTile), [&](std::int64_t k) {
    const std::int64_t column = k * kTile;
    f(TilePlace{block.begin + column, args.length, block.count,
                std::min<std::int64_t>(kTile, args.length - column)},
      column);
  });
}

template <class Scalar>
inline void pool_rows(const Plan& p, const Block& block) {
  using T = Acc<Scalar>;
  Tile<T> tile{};
  T running[kRows];
  std::fill_n(running, kRows, corner_pool::Forward<T>::start());
  for_tiles(p.args, block, p.reverse, [&](const TilePlace& place, std::int64_t) {
    read_tile<Scalar>(p.args.input, place, tile);
    in_direction(p.reverse, place.columns,
                 [&](std::int64_t c) { pool_step(tile.at[c], running, tile.at[c], kRows); });
    write_tile<Scalar>(tile, place, p.args.out);
  });
}

template <class Scalar>
inline void sum_rows(const Plan& p, const Block& block, std::int32_t* maxima) {
  using T = Acc<Scalar>;
  Tile<T> tile{};
  T running[kRows];
  std::fill_n(running, kRows, corner_pool::Forward<T>::start());
  for_tiles(p.args, block, !p.reverse, [&](const TilePlace& place, std::int64_t column) {
    read_tile<Scalar>(p.args.input, place, tile);
    in_direction(!p.reverse, place.columns, [&](std::int64_t c) {
      mark_step(tile.at[c], running, maxima + (column + c) * kRows, kRows);
    });
  });
  std::fill_n(running, kRows, corner_pool::Backward<T>::start());
  for_tiles(p.args, block, p.reverse, [&](const TilePlace& place, std::int64_t column) {
    read_tile<Scalar>(p.args.grad_output, place, tile);
    in_direction(p.reverse, place.columns, [&](std::int64_t c) {
      sum_step(tile.at[c], maxima + (column + c) * kRows, running, tile.at[c], kRows);
    });
    write_tile<Scalar>(tile, place, p.args.out);
  });
}

// Lines whose maxima would take too much memory: where these are, the forward's output says.
template <class Scalar>
[[gnu::noinline]] void sum_lines(const Plan& p, const Block& block) {
  using Pass = corner_pool::Backward<Acc<Scalar>>;
  Acc<Scalar> running[kSpan];
  std::fill_n(running, kSpan, Pass::start());
  const std::int64_t across = p.args.inner == 1 ? p.args.length : 1;
  auto* out = static_cast<Scalar*>(p.args.out);
  in_direction(p.reverse, p.args.length, [&](std::int64_t k) {
    for (std::int64_t i = 0; i < block.count; ++i) {
      const std::int64_t at = block.begin + k * p.args.inner + i * across;
      store(out[at], Pass::step(running[i], Pass::template item<Scalar>(p.args, at)));
    }
  });
}

// The blocks of a map or a tensor, by number.
struct Blocks {
  std::int64_t inner, lines, across, count;

  explicit Blocks(const Args& args)
      : inner(args.inner),
        lines(inner == 1 ? kRows : kSpan),
        across(ceil_div(inner, lines)),
        count(inner == 1 ? ceil_div(args.outer, lines) : args.outer * across) {}

  Block at(const Args& args, std::int64_t i) const {
    if (inner == 1)
      return {i * lines * args.length, std::min<std::int64_t>(lines, args.outer - i * lines)};
    const std::int64_t column = i % across * lines;
    return {i / across * args.length * inner + column,
            std::min<std::int64_t>(lines, inner - column)};
  }
};

template <class Scalar>
inline void run_blocks(const Plan& p, const Blocks& blocks, std::int64_t begin, std::int64_t end,
                       std::int32_t* maxima) {
  for (std::int64_t i = begin; i < end; ++i) {
    const Block block = blocks.at(p.args, i);
    if (p.backward && maxima == nullptr) {
      sum_lines<Scalar>(p, block);
    } else if (blocks.inner == 1) {
      p.backward ? sum_rows<Scalar>(p, block, maxima) : pool_rows<Scalar>(p, block);
    } else {
      p.backward ? sum_columns<Scalar>(p, block, maxima) : pool_columns<Scalar>(p, block);
    }
  }
}
TORCHKILN_POOL_LOOPS void run_floats(const Plan& p, const Blocks& blocks, std::int64_t begin,
                                     std::int64_t end, std::int32_t* maxima) {
  run_blocks<float>(p, blocks, begin, end, maxima);
}

Tensor run_cpu(const Plan& p) {
  const Blocks blocks(p.args);
  const auto lines =
      std::min<std::int64_t>(blocks.lines, blocks.inner == 1 ? p.args.outer : blocks.inner);
  const std::int64_t marks = p.args.length * blocks.lines;
  const bool marked = p.backward && marks <= kMostMarks;
  with_float(p.out.scalar_type(), [&]<class Scalar>() {
    parallel_for(blocks.count, p.args.length * lines, [&](std::int64_t begin, std::int64_t end) {
      std::unique_ptr<std::int32_t[]> maxima;
      if (marked)
        maxima = std::make_unique_for_overwrite<std::int32_t[]>(static_cast<std::size_t>(marks));
      if constexpr (std::is_same_v<Scalar, float>) {
        run_floats(p, blocks, begin, end, maxima.get());
      } else {
        run_blocks<Scalar>(p, blocks, begin, end, maxima.get());
      }
    });
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
