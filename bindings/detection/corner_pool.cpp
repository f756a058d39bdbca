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
#include <bit>
#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <tuple>
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
  Tensor maxima;           // on the CPU: what the forward keeps for the gradient
  bool backward, reverse;  // reverse: the scan of this pass starts at the end
  Args args;
};

// Places of a line whose maxima share an int32 of `maxima`, the first one its lowest bit.
constexpr std::int64_t kWord = 32;

void check(const char* name, const Tensor& map, std::int64_t mode) {
  check_floating(kOp, name, map);
  check_dim(kOp, name, map, 4, "(N, C, H, W)");
  if (mode < corner_pool::kTop || mode > corner_pool::kRight) {
    fail(TORCHKILN_ERROR_VALUE, kOp, "mode", "be 0 (top), 1 (bottom), 2 (left) or 3 (right)",
         std::to_string(mode));
  }
}

std::array<std::int64_t, 4> sizes_of(const Tensor& tensor) {
  return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)};
}

bool is_vertical(std::int64_t mode) {
  return mode == corner_pool::kTop || mode == corner_pool::kBottom;
}

// Of `maxima`, which has the layout of the map.
std::array<std::int64_t, 4> maxima_sizes(const Tensor& map, std::int64_t mode) {
  const auto [n, c, h, w] = sizes_of(map);
  if (is_vertical(mode)) return {n, c, ceil_div(h, kWord), w};
  return {n, c, h, ceil_div(w, kWord)};
}

// Fills in the sizes that both passes share. Rows of the map go through memory one after the other in either layout.
void set_sizes(Plan& p, std::int64_t mode, bool channels_last) {
  const auto [n, c, h, w] = sizes_of(p.out);
  const std::int64_t cell = channels_last ? c : 1, maps = channels_last ? n : n * c;
  const bool vertical = is_vertical(mode);
  p.args.outer = vertical ? maps : maps * h;
  p.args.length = vertical ? h : w;
  p.args.inner = vertical ? w * cell : cell;
  const bool from_end = mode == corner_pool::kTop || mode == corner_pool::kLeft;
  p.reverse = from_end != p.backward;
}

Plan plan(const Tensor& input, std::int64_t mode, bool with_maxima) {
  check("input", input, mode);
  const bool channels_last = is_channels_last(input);
  Plan p{.input = as_layout(input, channels_last),
         .pooled = {},
         .grad_output = {},
         .out = empty_layout(input, input.scalar_type(), sizes_of(input), channels_last),
         .maxima = with_maxima ? empty_layout(input, ScalarType::Int, maxima_sizes(input, mode),
                                              channels_last)
                               : empty(input, ScalarType::Int, {0}),
         .backward = false,
         .reverse = false,
         .args = {}};
  p.args.input = p.input.const_data_ptr();
  p.args.out = p.out.mutable_data_ptr();
  set_sizes(p, mode, channels_last);
  return p;
}

void check_backward(const Tensor& grad_output, const Tensor& input, const Tensor& pooled,
                    std::int64_t mode) {
  check("input", input, mode);
  const auto [n, c, h, w] = sizes_of(input);
  for (const auto& [name, tensor] :
       {std::pair{"grad_output", &grad_output}, std::pair{"pooled", &pooled}}) {
    check_same_dtype(kOp, name, *tensor, "input", input);
    check_same_device(kOp, name, *tensor, "input", input);
    check_shape(kOp, name, *tensor, {n, c, h, w});
  }
}

Plan plan_backward(const Tensor& grad_output, const Tensor& input, const Tensor& pooled,
                   std::int64_t mode) {
  check_backward(grad_output, input, pooled, mode);
  const bool channels_last = is_channels_last(input);
  Plan p{.input = as_layout(input, channels_last),
         .pooled = as_layout(pooled, channels_last),
         .grad_output = as_layout(grad_output, channels_last),
         .out = empty_layout(input, input.scalar_type(), sizes_of(input), channels_last),
         .maxima = {},
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
// Rows that are read ahead for the same reason.
constexpr std::int64_t kRowsAhead = 2;
template <class Scalar>
constexpr auto kLine = static_cast<std::int64_t>(64 / sizeof(Scalar));

using Word = std::uint32_t;

// Everything is inlined into each body.
#define TORCHKILN_POOL_LOOPS __attribute__((flatten, TORCHKILN_CLONES))

// Steps of n scans side by side; `bit` stands for this step in the words of maxima. The gradient reads these words alone:
// the map and the forward's output are 32 and more times as large.
template <class Scalar, class T>
inline void mark_step(const Scalar* x, Word bit, const T* running, Word* words, std::int64_t n) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    const bool takes = corner_pool::Forward<T>::takes(running[i], load(x[i]));
    words[i] |= takes ? bit : 0;
  }
}
template <class Scalar, class T>
inline void pool_step(const Scalar* x, T* running, Scalar* out, std::int64_t n) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    store(out[i], corner_pool::Forward<T>::step(running[i], {load(x[i])}));
  }
}
template <class Scalar, class T>
inline void sum_step(const Scalar* gradient, Word bit, T* running, const Word* words, Scalar* out,
                     std::int64_t n) {
#pragma GCC ivdep
  for (std::int64_t i = 0; i < n; ++i) {
    const bool is_maximum = (words[i] & bit) != 0;
    store(out[i], corner_pool::Backward<T>::step(running[i], {load(gradient[i]), is_maximum}));
  }
}

// Lines that are scanned together: where the first one and its words start, and how many there are.
struct Block {
  std::int64_t begin, words, count;
};

// The pointers of a pass.
template <class Scalar>
struct Pointers {
  const Scalar* from;  // the map, or the gradient
  Scalar* out;
  Word* marks;         // of the forward; none: they are not asked for
  const Word* maxima;  // of the gradient
};

// f(k) for all k in [0, n).
template <class F>
inline void in_direction(bool reverse, std::int64_t n, const F& f) {
  for (std::int64_t k = 0; k < n; ++k) f(reverse ? n - 1 - k : k);
}

// Columns. f(at, words, bit): a line of the block begins at `at`, its words at `words`.
template <class Scalar, class F>
inline void for_lines(const Plan& p, const Pointers<Scalar>& to, const Block& block, const F& f) {
  const auto [length, inner] = std::pair{p.args.length, p.args.inner};
  in_direction(p.reverse, length, [&](std::int64_t k) {
    const std::int64_t ahead =
        std::clamp<std::int64_t>(p.reverse ? k - kAhead : k + kAhead, 0, length - 1);
    for (std::int64_t i = 0; i < block.count; i += kLine<Scalar>) {
      __builtin_prefetch(to.from + block.begin + ahead * inner + i);
      __builtin_prefetch(to.out + block.begin + ahead * inner + i);
    }
    f(block.begin + k * inner, block.words + k / kWord * inner, Word{1} << (k % kWord));
  });
}

template <class Scalar>
inline void pool_columns(const Plan& p, const Pointers<Scalar>& to, const Block& block) {
  using T = Acc<Scalar>;
  T running[kSpan];
  std::fill_n(running, kSpan, corner_pool::Forward<T>::start());
  if (to.marks != nullptr) {
    for (std::int64_t k = 0; k < p.args.length; k += kWord)
      std::fill_n(to.marks + block.words + k / kWord * p.args.inner, block.count, Word{0});
  }
  for_lines(p, to, block, [&](std::int64_t at, std::int64_t words, Word bit) {
    if (to.marks != nullptr) mark_step(to.from + at, bit, running, to.marks + words, block.count);
    pool_step(to.from + at, running, to.out + at, block.count);
  });
}

template <class Scalar>
inline void sum_columns(const Plan& p, const Pointers<Scalar>& to, const Block& block) {
  using T = Acc<Scalar>;
  T running[kSpan];
  std::fill_n(running, kSpan, corner_pool::Backward<T>::start());
  for_lines(p, to, block, [&](std::int64_t at, std::int64_t words, Word bit) {
    sum_step(to.from + at, bit, running, to.maxima + words, to.out + at, block.count);
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
inline void read_tile(const Scalar* tensor, const TilePlace& place, Tile<T>& tile) {
  const Scalar* from = tensor + place.begin;
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
inline void write_tile(const Tile<T>& tile, const TilePlace& place, Scalar* tensor) {
  Scalar* to = tensor + place.begin;
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
inline void for_tiles(const Plan& p, const Block& block, const F& f) {
  const std::int64_t length = p.args.length;
  in_direction(p.reverse, ceil_div(length, kTile), [&](std::int64_t k) {
    const std::int64_t column = k * kTile;
    f(TilePlace{block.begin + column, length, block.count,
                std::min<std::int64_t>(kTile, length - column)},
      column);
  });
}

template <class Scalar>
inline void pool_rows(const Plan& p, const Pointers<Scalar>& to, const Block& block) {
  using T = Acc<Scalar>;
  const std::int64_t words_a_row = ceil_div(p.args.length, kWord);
  if (to.marks != nullptr) std::fill_n(to.marks + block.words, block.count * words_a_row, Word{0});
  Tile<T> tile{};
  T running[kRows];
  std::fill_n(running, kRows, corner_pool::Forward<T>::start());
  for_tiles(p, block, [&](const TilePlace& place, std::int64_t column) {
    Word words[kRows] = {};
    read_tile(to.from, place, tile);
    in_direction(p.reverse, place.columns, [&](std::int64_t c) {
      const Word bit = Word{1} << ((column + c) % kWord);
      if (to.marks != nullptr) mark_step(tile.at[c], bit, running, words, kRows);
      pool_step(tile.at[c], running, tile.at[c], kRows);
    });
    write_tile(tile, place, to.out);
    if (to.marks != nullptr) {
      Word* marks = to.marks + block.words + column / kWord;
      for (std::int64_t row = 0; row < place.rows; ++row) marks[row * words_a_row] |= words[row];
    }
  });
}

// Vectors of 32 bytes. They go by reference: how one is passed by value depends on the instruction set.
template <class T, class = std::make_index_sequence<32 / sizeof(T)>>
struct Lanes;
template <class T, std::size_t... kLane>
struct Lanes<T, std::index_sequence<kLane...>> {
  static constexpr int kCount = sizeof...(kLane);
  using Int = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef T Values __attribute__((vector_size(32)));
  typedef Int Bits __attribute__((vector_size(32)));

  // All bits of the lanes whose bit is set.
  static void select(Word bits, Bits& to) {
    const Bits own = {(Int{1} << kLane)...};
    to = (own & static_cast<Int>(bits)) != 0;
  }
  static void keep(const Bits& lanes, Values& of) {
    of = reinterpret_cast<Values>(reinterpret_cast<Bits>(of) & lanes);
  }
  // For each lane the one that comes kBy lanes earlier in the scan, or zero.
  template <bool kReverse, int kBy, class V>
  static void earlier(const V& from, V& to) {
    const V none = {};
    to = kReverse ? __builtin_shufflevector(from, none, (kLane + kBy)...)
                  : __builtin_shufflevector(none, from, (kLane + kCount - kBy)...);
  }
  // Adds sums of kBy lanes up to sums of all.
  template <int kBy = 1>
  static void add_up(Values& of) {
    of += __builtin_shufflevector(of, of, (kLane ^ kBy)...);
    if constexpr (2 * kBy < kCount) add_up<2 * kBy>(of);
  }
  // Adds to each lane those before it in the scan, back to the last maximum. `closed`: one lies in the kBy lanes before.
  template <bool kReverse, int kBy = 1>
  static void add_runs(Bits& closed, Values& of) {
    Values more;
    earlier<kReverse, kBy>(of, more);
    keep(~closed, more);
    of += more;
    if constexpr (2 * kBy < kCount) {
      Bits before;
      earlier<kReverse, kBy>(closed, before);
      closed |= before;
      add_runs<kReverse, 2 * kBy>(closed, of);
    }
  }

  // `pending`: sums of what the next maximum gets besides.
  template <bool kReverse>
  static void step(Word bits, const T* gradients, T* out, Values& pending) {
    Values sums;
    std::memcpy(&sums, gradients, sizeof(Values));
    if (bits == 0) [[likely]] {
      const Values none = {};
      pending += sums;
      std::memcpy(out, &none, sizeof(Values));
      return;
    }
    Bits is_maximum, is_first, is_last, closed;
    select(bits, is_maximum);
    select(kReverse ? std::bit_floor(bits) : bits & (~bits + 1), is_first);
    select(kReverse ? Word{1} : Word{1} << (kCount - 1), is_last);
    earlier<kReverse, 1>(is_maximum, closed);
    add_runs<kReverse>(closed, sums);
    add_up(pending);
    keep(is_first, pending);
    Values own = sums;
    keep(is_maximum, own);
    own += pending;
    std::memcpy(out, &own, sizeof(Values));
    keep(is_last & ~is_maximum, sums);
    pending = sums;
  }
};

// Zeros behind the last item. Once for all bodies, as what stores them.
template <class Scalar, class T>
[[gnu::noinline]] void load_some(const Scalar* from, std::int64_t count, T* to) {
  std::fill_n(to, kWord, T(0));
  for (std::int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}
template <class Scalar, class T>
[[gnu::noinline]] void store_some(const T* from, std::int64_t count, Scalar* to) {
  for (std::int64_t i = 0; i < count; ++i) store(to[i], from[i]);
}

// One row, for which nothing is turned: few items are maxima, and vectors between these are added up.
template <bool kReverse, class Scalar>
inline void sum_row(const Scalar* from, Scalar* to, const Word* words, std::int64_t length) {
  using T = Acc<Scalar>;
  using L = Lanes<T>;
  typename L::Values pending = {};
  in_direction(kReverse, ceil_div(length, kWord), [&](std::int64_t k) {
    const Word word = words[k];
    const std::int64_t begin = k * kWord, end = std::min(begin + kWord, length);
    if constexpr (kReverse) {
      for (std::int64_t at = begin + kRowsAhead * length, i = 0; i < kWord; i += kLine<Scalar>) {
        __builtin_prefetch(from + at + i);
        __builtin_prefetch(to + at + i, 1);
      }
    }
    // Full words of T are read and written in place.
    const bool in_place = std::is_same_v<Scalar, T> && end - begin == kWord;
    T items[kWord];
    if (!in_place) load_some(from + begin, end - begin, items);
    const T* gradients = in_place ? reinterpret_cast<const T*>(from + begin) : items;
    T* sums = in_place ? reinterpret_cast<T*>(to + begin) : items;
#pragma GCC unroll 1
    for (std::int64_t part = 0; part < kWord; part += L::kCount) {
      const std::int64_t lane = kReverse ? kWord - L::kCount - part : part;
      const Word bits = word >> lane & ((Word{1} << L::kCount) - 1);
      L::template step<kReverse>(bits, gradients + lane, sums + lane, pending);
    }
    if (!in_place) store_some(items, end - begin, to + begin);
  });
}

template <class Scalar>
inline void sum_rows(const Plan& p, const Pointers<Scalar>& to, const Block& block) {
  const std::int64_t length = p.args.length, words = ceil_div(length, kWord);
  for (std::int64_t row = 0; row < block.count; ++row) {
    const std::int64_t at = block.begin + row * length;
    const Word* maxima = to.maxima + block.words + row * words;
    p.reverse ? sum_row<true>(to.from + at, to.out + at, maxima, length)
              : sum_row<false>(to.from + at, to.out + at, maxima, length);
  }
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
    const std::int64_t words = ceil_div(args.length, kWord);
    if (inner == 1) {
      const std::int64_t row = i * lines;
      return {row * args.length, row * words, std::min<std::int64_t>(lines, args.outer - row)};
    }
    const std::int64_t map = i / across * inner, column = i % across * lines;
    return {map * args.length + column, map * words + column,
            std::min<std::int64_t>(lines, inner - column)};
  }
};

template <class Scalar>
inline void run_blocks(const Plan& p, const Pointers<Scalar>& to, const Blocks& blocks,
                       std::int64_t begin, std::int64_t end) {
  const bool rows = blocks.inner == 1;
  for (std::int64_t i = begin; i < end; ++i) {
    const Block block = blocks.at(p.args, i);
    if (p.backward) {
      rows ? sum_rows(p, to, block) : sum_columns(p, to, block);
    } else {
      rows ? pool_rows(p, to, block) : pool_columns(p, to, block);
    }
  }
}
TORCHKILN_POOL_LOOPS void run_floats(const Plan& p, const Pointers<float>& to, const Blocks& blocks,
                                     std::int64_t begin, std::int64_t end) {
  run_blocks(p, to, blocks, begin, end);
}

template <class Scalar>
Pointers<Scalar> pointers(const Plan& p) {
  const bool marks = !p.backward && p.maxima.numel() > 0;
  return {.from = static_cast<const Scalar*>(p.backward ? p.args.grad_output : p.args.input),
          .out = static_cast<Scalar*>(p.args.out),
          .marks = marks ? static_cast<Word*>(p.maxima.mutable_data_ptr()) : nullptr,
          .maxima = static_cast<const Word*>(p.maxima.const_data_ptr())};
}

void run_cpu(const Plan& p) {
  const Blocks blocks(p.args);
  const auto lines =
      std::min<std::int64_t>(blocks.lines, blocks.inner == 1 ? p.args.outer : blocks.inner);
  with_float(p.out.scalar_type(), [&]<class Scalar>() {
    const Pointers<Scalar> to = pointers<Scalar>(p);
    parallel_for(blocks.count, p.args.length * lines, [&](std::int64_t begin, std::int64_t end) {
      if constexpr (std::is_same_v<Scalar, float>) {
        run_floats(p, to, blocks, begin, end);
      } else {
        run_blocks(p, to, blocks, begin, end);
      }
    });
  });
}

std::tuple<Tensor, Tensor> cpu(const Tensor& input, std::int64_t mode, bool with_maxima) {
  const Plan p = plan(input, mode, with_maxima);
  run_cpu(p);
  return {p.out, p.maxima};
}

Tensor backward_maxima_cpu(const Tensor& grad_output, const Tensor& maxima, std::int64_t mode,
                           bool channels_last) {
  check("grad_output", grad_output, mode);
  const auto [n, c, h, w] = maxima_sizes(grad_output, mode);
  check_shape(kOp, "maxima", maxima, {n, c, h, w});
  check_same_device(kOp, "maxima", maxima, "grad_output", grad_output);
  if (maxima.scalar_type() != ScalarType::Int)
    fail(TORCHKILN_ERROR_TYPE, kOp, "maxima", "be an int32 tensor", text(maxima.scalar_type()));
  Plan p{.input = {},
         .pooled = {},
         .grad_output = as_layout(grad_output, channels_last),
         .out = empty_layout(grad_output, grad_output.scalar_type(), sizes_of(grad_output),
                             channels_last),
         .maxima = as_layout(maxima, channels_last),
         .backward = true,
         .reverse = false,
         .args = {}};
  p.args.grad_output = p.grad_output.const_data_ptr();
  p.args.out = p.out.mutable_data_ptr();
  set_sizes(p, mode, channels_last);
  run_cpu(p);
  return p.out;
}

// Calls that kept no maxima: they are found anew.
Tensor backward_cpu(const Tensor& grad_output, const Tensor& input, const Tensor& pooled,
                    std::int64_t mode) {
  check_backward(grad_output, input, pooled, mode);
  const Tensor maxima = std::get<1>(cpu(input, mode, true));
  return backward_maxima_cpu(grad_output, maxima, mode, is_channels_last(input));
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

// Nothing is kept: the gradient finds the maxima in the map and the output.
std::tuple<Tensor, Tensor> cuda(const Tensor& input, std::int64_t mode, bool /*with_maxima*/) {
  const Plan p = plan(input, mode, false);
  if (p.out.numel() > 0)
    launch(p, {reads(offsetof(Args, input), p.input), writes(offsetof(Args, out), p.out)});
  return {p.out, p.maxima};
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
  m.def("corner_pool(Tensor input, int mode, bool with_maxima=False) -> (Tensor, Tensor)");
  m.def(
      "_corner_pool_backward(Tensor grad_output, Tensor input, Tensor pooled, int mode) -> Tensor");
  m.def(
      "_corner_pool_backward_maxima(Tensor grad_output, Tensor maxima, int mode, "
      "bool channels_last) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) {
  m.impl("corner_pool", TORCH_BOX(&cpu));
  m.impl("_corner_pool_backward", TORCH_BOX(&backward_cpu));
  m.impl("_corner_pool_backward_maxima", TORCH_BOX(&backward_maxima_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("corner_pool", TORCH_BOX(&cuda));
  m.impl("_corner_pool_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace torchkiln::bindings
