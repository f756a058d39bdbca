// The launches of the nms family: kernels, memory, order, suppression.
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <initializer_list>

#include "bindings/detection/nms.h"
#include "detection/nms_shapes.h"

namespace torchkiln::bindings {
namespace {

using nms::Args;

struct BoxStatics {
  std::int64_t scalar, classes;
};
struct ShapeStatics {
  std::int64_t scalar, kind, classes;
};
struct Sizes {
  std::int64_t n;
};
struct SortTunables {
  std::int64_t block_size;
};
struct MergeTunables {
  std::int64_t lanes, block_size;
};
struct SuppressTunables {
  std::int64_t panel, block_size;
};
struct CompactStatics {};

// The three kernels of a template file.
template <class Statics>
class Stages {
  using Sort = Kernel<Args, Statics, Sizes, SortTunables>;
  using Merge = Kernel<Args, Statics, Sizes, MergeTunables>;
  using Suppress = Kernel<Args, Statics, Sizes, SuppressTunables>;

  // With classes there are two orders to make: by score, and by class and score.
  static Geometry over_orders(std::int64_t classes, Geometry g) {
    g.grid[1] = classes != 0 ? 2 : 1;
    return g;
  }

 public:
  // `order_operators` need the order, `operators` suppression after it.
  Stages(const char* path, const std::vector<const char*>& order_operators,
         const std::vector<const char*>& operators, const std::vector<Parameter>& statics,
         SuppressTunables suppress_default, bool (*valid)(const Statics&) = nullptr,
         bool (*legal)(const typename Suppress::Problem&, const SuppressTunables&) = nullptr)
      : sort({
            .path = path,
            .entry = "sort",
            .operators = order_operators,
            .statics = statics,
            .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
            .tunables = {ints("block_size", {64, 128, 256, 512})},
            .defaults = {{512}},
            .valid = valid,
            .geometry =
                [](const typename Sort::Problem& p, const SortTunables& t) {
                  return over_orders(p.statics.classes,
                                     linear(ceil_div(p.sizes.n, nms::kTile), t.block_size));
                },
        }),
        merge({
            .path = path,
            .entry = "merge",
            .operators = order_operators,
            .statics = statics,
            .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
            .tunables = {ints("lanes", {1, 4, 8, 16, 32}), ints("block_size", {128, 256})},
            .defaults = {{8, 256}, {4, 128}},
            .valid = valid,
            .choose =
                [](const typename Merge::Problem& p) {
                  return p.sizes.n > 32 * nms::kTile ? 1u : 0u;
                },
            .geometry =
                [](const typename Merge::Problem& p, const MergeTunables& t) {
                  return over_orders(
                      p.statics.classes,
                      linear(ceil_div(p.sizes.n * t.lanes, t.block_size), t.block_size));
                },
        }),
        // A wide panel halves the decisions that follow each other, a narrow one spreads the tests over more blocks.
        suppress({
            .path = path,
            .entry = "suppress",
            .operators = operators,
            .statics = statics,
            .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
            .tunables = {ints("panel", {32, 64, 128}), ints("block_size", {128, 256, 512})},
            .defaults = {suppress_default},
            .valid = valid,
            .legal = legal,
            .geometry =
                [](const typename Suppress::Problem& p, const SuppressTunables& t) {
                  return linear(ceil_div(p.sizes.n, t.panel), t.block_size);
                },
        }) {}

  const Sort sort;
  const Merge merge;
  const Suppress suppress;
};

const std::vector<const char*> kBoxOperators = {"nms", "batched_nms", "nms_padded"};
const std::vector<const char*> kShapeOperators = {
    "nms_rotated",    "nms_rotated_padded", "nms_quadri",   "nms_quadri_padded",
    "nms3d",          "nms3d_padded",       "nms3d_normal", "nms3d_normal_padded",
    "nms_groups",     "_nms_by_peer",       "line_nms",     "line_nms_padded",
    "line_nms_groups"};

// soft_nms finds its classes by the order, too.
const Stages<BoxStatics> box_stages(
    "detection/nms.cuh", {"nms", "batched_nms", "nms_padded", "soft_nms", "soft_nms_padded"},
    kBoxOperators, {types("scalar", kFloatTypes), bools("classes")}, {64, 256});
// Tests are long: more threads share those of a box.
const Stages<ShapeStatics> shape_stages(
    "detection/nms_shapes.cuh", kShapeOperators, kShapeOperators,
    {types("scalar", kFloatTypes),
     ints("kind", {nms::kRotated, nms::kQuads, nms::kNormal, nms::kInclusive, nms::kPeerRotated,
                   nms::kPeerQuads, nms::kLanes}),
     bools("classes")},
    {64, 512},
    [](const ShapeStatics& s) {
      if (s.kind == nms::kPeerRotated || s.kind == nms::kPeerQuads)
        return s.scalar == TORCHKILN_FLOAT;
      return s.kind != nms::kInclusive || s.classes == 0;
    },
    // A wide panel of quads in doubles is more shared memory than a kernel may declare.
    [](const auto& p, const SuppressTunables& t) {
      return !(p.statics.kind == nms::kQuads && p.statics.scalar == TORCHKILN_DOUBLE &&
               t.panel > 64);
    });

using Compact = Kernel<Args, CompactStatics, Sizes, SortTunables>;
const Compact compact_kernel({
    .path = "detection/nms.cuh",
    .entry = "compact",
    .operators = {"batched_nms", "nms_padded", "nms_rotated", "nms_rotated_padded", "nms_quadri",
                  "nms_quadri_padded", "nms3d", "nms3d_padded", "nms3d_normal",
                  "nms3d_normal_padded", "_nms_by_peer", "line_nms", "line_nms_padded"},
    .statics = {},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{1024}},
    .geometry = [](const Compact::Problem&,
                   const SortTunables& t) { return linear(1, t.block_size); },
});

struct MatchStatics {
  std::int64_t scalar, kind;
};
using Match = Kernel<nms::MatchArgs, MatchStatics, Sizes, SortTunables>;

const Match match_kernel({
    .path = "detection/nms_shapes.cuh",
    .entry = "match",
    .operators = {"nms_groups", "line_nms_groups"},
    .statics = {types("scalar", kFloatTypes), ints("kind", {nms::kInclusive, nms::kLanes})},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{128}},
    .geometry =
        [](const Match::Problem& p, const SortTunables& t) {
          return linear(ceil_div(p.sizes.n * 32, t.block_size), t.block_size);
        },
});

// Words for whole panels of any width.
constexpr std::int64_t kWidestPanel = 128;
std::int64_t count_words(std::int64_t n) { return ceil_div(n, kWidestPanel) * (kWidestPanel / 32); }

// Numbers that the tests need of a box: sizes of the kinds' shapes.
std::int64_t shape_numbers(std::int64_t kind) {
  constexpr std::size_t kNumber = sizeof(float);
  if (kind == nms::kRotated || kind == nms::kPeerRotated) return sizeof(Rotated<float>) / kNumber;
  if (kind == nms::kQuads || kind == nms::kPeerQuads) return sizeof(Quad<float>) / kNumber;
  return sizeof(Box<float>) / kNumber;
}

// The scratch memory of a call, cut from one allocation.
struct Workspace {
  std::int64_t keys, sorted_boxes, sorted_rows, first, score_rows, score_ranks, kept, words,
      counters;  // bytes

  explicit Workspace(const NmsPlan& p)
      : Workspace(p.args.n, p.args.idxs != nullptr, p.boxes.scalar_type() == ScalarType::Double,
                  shape_numbers(p.kind)) {}
  Workspace(std::int64_t n, bool classes, bool wide, std::int64_t numbers)
      : keys(n > nms::kTile ? (classes ? 2 : 1) * n * 8 * ((classes ? 1 : 0) + (wide ? 2 : 1)) : 0),
        sorted_boxes(n * numbers * (wide ? 8 : 4)),
        sorted_rows(n * 4),
        first(classes ? n * 4 : 0),
        score_rows(first),
        score_ranks(first),
        kept(classes ? ceil_div(n, 16) * 16 : 0),
        words(count_words(n) * 8),
        counters(8) {}

  std::int64_t total() const {
    std::int64_t sum = 0;
    for (const std::int64_t part :
         {keys, sorted_boxes, sorted_rows, first, score_rows, score_ranks, kept, words, counters})
      sum += padded(part);
    return sum;
  }

  // Vector loads need 16 bytes, and neighbours that several blocks poll should not share a line.
  static std::int64_t padded(std::int64_t bytes) { return ceil_div(bytes, 128) * 128; }
};

// Cuts the workspace into the pointers of the arguments.
void place(const Workspace& sizes, std::uint8_t* memory, Args& args) {
  const auto take = [&]<class T>(T*& pointer, std::int64_t bytes) {
    pointer = reinterpret_cast<T*>(memory);
    memory += Workspace::padded(bytes);
  };
  std::uint8_t* keys = nullptr;
  std::uint8_t* sorted_boxes = nullptr;
  take(keys, sizes.keys);
  take(sorted_boxes, sizes.sorted_boxes);
  args.keys = keys;
  args.sorted_boxes = sorted_boxes;
  take(args.sorted_rows, sizes.sorted_rows);
  take(args.first, sizes.first);
  take(args.score_rows, sizes.score_rows);
  take(args.score_ranks, sizes.score_ranks);
  take(args.kept, sizes.kept);
  take(args.words, sizes.words);
  take(args.counters, sizes.counters);
}

Buffer part(std::size_t offset, torchkiln_access access, std::int64_t bytes) {
  return buffer(offset, access, bytes);
}
constexpr auto kRead = TORCHKILN_READ, kWrite = TORCHKILN_WRITE, kUpdate = TORCHKILN_READ_WRITE;

// Calls f with the kernels for the kind of boxes, and their statics.
template <class F>
void with_stages(const NmsPlan& p, const F& f) {
  const std::int64_t scalar = kernel_type(p.boxes.scalar_type());
  const std::int64_t classes = p.args.idxs != nullptr ? 1 : 0;
  if (p.kind == kBoxKind) {
    f(box_stages, BoxStatics{scalar, classes});
  } else {
    f(shape_stages, ShapeStatics{scalar, p.kind, classes});
  }
}

}  // namespace

// Suppress, and compact where there are classes.
void suppress(const CudaPlace& cuda_place, const NmsPlan& p, const Ordered& ordered) {
  const Args& args = ordered.args;
  const bool classes = args.idxs != nullptr;
  const Workspace sizes(p);
  const std::int64_t out = args.max_output * 8;
  // The shapes of lanes point to their rows.
  const Buffer shape_inputs =
      p.kind == nms::kLanes ? reads(offsetof(Args, boxes), p.boxes) : unused(offsetof(Args, boxes));
  with_stages(p, [&](const auto& stages, const auto& statics) {
    stages.suppress.run(
        cuda_place, statics, {args.n}, args,
        {part(offsetof(Args, sorted_boxes), kRead, sizes.sorted_boxes),
         part(offsetof(Args, sorted_rows), kRead, sizes.sorted_rows),
         part(offsetof(Args, first), kRead, sizes.first),
         part(offsetof(Args, score_ranks), kRead, sizes.score_ranks),
         part(offsetof(Args, kept), kUpdate, sizes.kept),
         part(offsetof(Args, words), kUpdate, sizes.words),
         part(offsetof(Args, counters), kUpdate, sizes.counters),
         part(offsetof(Args, indices), kUpdate, out), part(offsetof(Args, count), kWrite, 8),
         shape_inputs, reads(offsetof(Args, scores), p.scores), unused(offsetof(Args, idxs)),
         unused(offsetof(Args, keys)), unused(offsetof(Args, score_rows))});
  });
  if (classes) {
    compact_kernel.run(
        cuda_place, CompactStatics{}, {args.n}, args,
        {part(offsetof(Args, score_rows), kRead, sizes.score_rows),
         part(offsetof(Args, kept), kRead, sizes.kept), part(offsetof(Args, indices), kUpdate, out),
         part(offsetof(Args, count), kWrite, 8), unused(offsetof(Args, boxes)),
         unused(offsetof(Args, scores)), unused(offsetof(Args, idxs)), unused(offsetof(Args, keys)),
         unused(offsetof(Args, sorted_boxes)), unused(offsetof(Args, sorted_rows)),
         unused(offsetof(Args, first)), unused(offsetof(Args, score_ranks)),
         unused(offsetof(Args, words)), unused(offsetof(Args, counters))});
  }
}

// Sort, and merge where there are several tiles.
Ordered order(const CudaPlace& cuda_place, const NmsPlan& p, const Tensor& indices,
              std::int64_t* count) {
  const Workspace sizes(p);
  Ordered ordered{.workspace = empty(p.boxes, ScalarType::Byte, {sizes.total()}), .args = p.args};
  Args& args = ordered.args;
  place(sizes, mutable_data<std::uint8_t>(ordered.workspace), args);
  args.n_words = count_words(args.n);
  args.indices = reinterpret_cast<i64*>(indices.mutable_data_ptr());
  args.count = reinterpret_cast<i64*>(count);
  args.max_output = indices.numel();

  const Buffer boxes = reads(offsetof(Args, boxes), p.boxes);
  const Buffer scores = reads(offsetof(Args, scores), p.scores);
  const Buffer sorted_boxes = part(offsetof(Args, sorted_boxes), kWrite, sizes.sorted_boxes);
  const Buffer sorted_rows = part(offsetof(Args, sorted_rows), kWrite, sizes.sorted_rows);
  const Buffer first = part(offsetof(Args, first), kWrite, sizes.first);
  const Buffer score_rows = part(offsetof(Args, score_rows), kWrite, sizes.score_rows);
  const Buffer score_ranks = part(offsetof(Args, score_ranks), kWrite, sizes.score_ranks);
  with_stages(p, [&](const auto& stages, const auto& statics) {
    stages.sort.run(cuda_place, statics, {args.n}, args,
                    {boxes, scores, reads(offsetof(Args, idxs), args.n * args.idx_bytes),
                     part(offsetof(Args, keys), kWrite, sizes.keys), sorted_boxes, sorted_rows,
                     first, score_rows, score_ranks, part(offsetof(Args, kept), kWrite, sizes.kept),
                     part(offsetof(Args, words), kWrite, sizes.words),
                     part(offsetof(Args, counters), kWrite, sizes.counters),
                     part(offsetof(Args, indices), kWrite, args.max_output * 8),
                     unused(offsetof(Args, count))});
    if (args.n > nms::kTile) {
      stages.merge.run(cuda_place, statics, {args.n}, args,
                       {boxes, scores, part(offsetof(Args, keys), kRead, sizes.keys), sorted_boxes,
                        sorted_rows, first, score_rows, score_ranks, unused(offsetof(Args, idxs)),
                        unused(offsetof(Args, kept)), unused(offsetof(Args, words)),
                        unused(offsetof(Args, counters)), unused(offsetof(Args, indices)),
                        unused(offsetof(Args, count))});
    }
  });
  return ordered;
}

// One per thread, never given back: a call has read its number before the thread can make another.
std::int64_t* host_number() {
  thread_local const Tensor* const number = new Tensor(
      torch::stable::empty({1}, ScalarType::Long, std::nullopt,
                           torch::stable::Device(torch::headeronly::DeviceType::CPU), true));
  return mutable_data<std::int64_t>(*number);
}

// The one place that waits: the size of the result depends on the data.
Tensor sized_cuda(const NmsPlan& p, std::int64_t max_output) {
  Tensor indices = empty(p.boxes, ScalarType::Long, {std::min<std::int64_t>(max_output, p.args.n)});
  if (indices.numel() == 0) return indices;
  const CudaPlace cuda_place(p.boxes);
  constexpr const char* kWayOut =
      "Use the form of torchkiln.ops whose result has a fixed size: nms_padded and its like";
  check(torchkiln_capture_guard(cuda_place.device(), cuda_place.stream(), p.op, kWayOut));
  std::int64_t* count = host_number();
  suppress(cuda_place, p, order(cuda_place, p, indices, count));
  check(torchkiln_synchronize(cuda_place.device(), cuda_place.stream(), p.op, kWayOut));
  return torch::stable::narrow(indices, 0, 0, *static_cast<volatile std::int64_t*>(count));
}

Padded padded_cuda(const NmsPlan& p, std::int64_t max_output) {
  Tensor indices = empty(p.boxes, ScalarType::Long, {max_output});
  if (p.args.n == 0) {
    torch::stable::fill_(indices, -1);
    return {indices, zeros(p.boxes, ScalarType::Long, {})};
  }
  const Tensor count = empty(p.boxes, ScalarType::Long, {});
  const CudaPlace cuda_place(p.boxes);
  suppress(cuda_place, p, order(cuda_place, p, indices, mutable_data<std::int64_t>(count)));
  return {indices, count};
}

Groups groups_cuda(const NmsPlan& p) {
  const std::int64_t n = p.args.n;
  const Groups out{.rows = empty(p.boxes, ScalarType::Long, {n}),
                   .groups = empty(p.boxes, ScalarType::Long, {n}),
                   .count = zeros(p.boxes, ScalarType::Long, {})};
  if (n == 0) return out;
  const CudaPlace cuda_place(p.boxes);
  const Tensor kept = empty(p.boxes, ScalarType::Long, {n});
  const Ordered ordered = order(cuda_place, p, kept, mutable_data<std::int64_t>(out.count));
  suppress(cuda_place, p, ordered);
  using nms::MatchArgs;
  MatchArgs args{};
  args.boxes = p.args.boxes;
  args.scores = p.args.scores;
  args.sorted_rows = ordered.args.sorted_rows;
  args.kept = reinterpret_cast<const i64*>(kept.const_data_ptr());
  args.count = reinterpret_cast<const i64*>(out.count.const_data_ptr());
  args.rows = reinterpret_cast<i64*>(out.rows.mutable_data_ptr());
  args.groups = reinterpret_cast<i64*>(out.groups.mutable_data_ptr());
  args.n = n;
  args.columns = p.args.columns;
  args.iou_threshold = p.args.iou_threshold;
  match_kernel.run(
      cuda_place, MatchStatics{kernel_type(p.boxes.scalar_type()), p.kind}, {n}, args,
      {reads(offsetof(MatchArgs, boxes), p.boxes), reads(offsetof(MatchArgs, scores), p.scores),
       part(offsetof(MatchArgs, sorted_rows), kRead, n * 4), reads(offsetof(MatchArgs, kept), kept),
       reads(offsetof(MatchArgs, count), out.count), writes(offsetof(MatchArgs, rows), out.rows),
       writes(offsetof(MatchArgs, groups), out.groups)});
  return out;
}

}  // namespace torchkiln::bindings
