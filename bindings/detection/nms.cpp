// nms, batched_nms and nms_padded: schema, checks and memory, launches. (The CPU version is nms_cpu.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/detection/nms.h"

#include <array>
#include <cstddef>
#include <initializer_list>
#include <tuple>

#include "bindings/support/cuda.h"

namespace torchkiln::bindings {
namespace {

using nms::Args;

struct Statics {
  std::int64_t scalar, classes;
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

using Sort = Kernel<Args, Statics, Sizes, SortTunables>;
using Merge = Kernel<Args, Statics, Sizes, MergeTunables>;
using Suppress = Kernel<Args, Statics, Sizes, SuppressTunables>;
using Compact = Kernel<Args, CompactStatics, Sizes, SortTunables>;

const std::vector<const char*> kOperators = {"nms", "batched_nms", "nms_padded"};
// soft_nms finds the classes so, too.
const std::vector<const char*> kOrderOperators = {"nms", "batched_nms", "nms_padded", "soft_nms",
                                                  "soft_nms_padded"};
const std::vector<Parameter> kStatics = {types("scalar", kFloatTypes), bools("classes")};

// With classes there are two orders to make: by score, and by class and score.
Geometry over_orders(std::int64_t classes, Geometry g) {
  g.grid[1] = classes != 0 ? 2 : 1;
  return g;
}

const Sort sort_kernel({
    .path = "detection/nms.cuh",
    .entry = "sort",
    .operators = kOrderOperators,
    .statics = kStatics,
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {64, 128, 256, 512})},
    .defaults = {{512}},
    .geometry =
        [](const Sort::Problem& p, const SortTunables& t) {
          return over_orders(p.statics.classes,
                             linear(ceil_div(p.sizes.n, nms::kTile), t.block_size));
        },
});

const Merge merge_kernel({
    .path = "detection/nms.cuh",
    .entry = "merge",
    .operators = kOrderOperators,
    .statics = kStatics,
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("lanes", {1, 4, 8, 16, 32}), ints("block_size", {128, 256})},
    .defaults = {{8, 256}, {4, 128}},
    .choose = [](const Merge::Problem& p) { return p.sizes.n > 32 * nms::kTile ? 1u : 0u; },
    .geometry =
        [](const Merge::Problem& p, const MergeTunables& t) {
          return over_orders(p.statics.classes,
                             linear(ceil_div(p.sizes.n * t.lanes, t.block_size), t.block_size));
        },
});

// A wide panel halves the decisions that follow each other, a narrow one spreads the tests over more blocks.
const Suppress suppress_kernel({
    .path = "detection/nms.cuh",
    .entry = "suppress",
    .operators = kOperators,
    .statics = kStatics,
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("panel", {32, 64, 128}), ints("block_size", {128, 256, 512})},
    .defaults = {{64, 256}},
    .geometry =
        [](const Suppress::Problem& p, const SuppressTunables& t) {
          return linear(ceil_div(p.sizes.n, t.panel), t.block_size);
        },
});

const Compact compact_kernel({
    .path = "detection/nms.cuh",
    .entry = "compact",
    .operators = {"batched_nms", "nms_padded"},
    .statics = {},
    .sizes = {{"n", TORCHKILN_BUCKET_POW2}},
    .tunables = {ints("block_size", {128, 256, 512, 1024})},
    .defaults = {{1024}},
    .geometry = [](const Compact::Problem&,
                   const SortTunables& t) { return linear(1, t.block_size); },
});

// Words for whole panels of any width.
constexpr std::int64_t kWidestPanel = 128;
std::int64_t count_words(std::int64_t n) { return ceil_div(n, kWidestPanel) * (kWidestPanel / 32); }

// The scratch memory of a call, cut from one allocation.
struct Workspace {
  std::int64_t keys, sorted_boxes, sorted_rows, first, score_rows, score_ranks, kept, words,
      counters;  // bytes

  explicit Workspace(const NmsPlan& p)
      : Workspace(p.args.n, p.args.idxs != nullptr, p.boxes.scalar_type() == ScalarType::Double) {}
  Workspace(std::int64_t n, bool classes, bool wide)
      : keys(n > nms::kTile ? (classes ? 2 : 1) * n * 8 * ((classes ? 1 : 0) + (wide ? 2 : 1)) : 0),
        sorted_boxes(n * 4 * (wide ? 8 : 4)),
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

// Suppress, and compact where there are classes.
void suppress(const CudaPlace& cuda_place, const NmsPlan& p, const Ordered& ordered) {
  const Args& args = ordered.args;
  const bool classes = args.idxs != nullptr;
  const Workspace sizes(p);
  const std::int64_t out = args.max_output * 8;
  const Statics statics{kernel_type(p.boxes.scalar_type()), classes ? 1 : 0};
  suppress_kernel.run(
      cuda_place, statics, {args.n}, args,
      {part(offsetof(Args, sorted_boxes), kRead, sizes.sorted_boxes),
       part(offsetof(Args, sorted_rows), kRead, sizes.sorted_rows),
       part(offsetof(Args, first), kRead, sizes.first),
       part(offsetof(Args, score_ranks), kRead, sizes.score_ranks),
       part(offsetof(Args, kept), kUpdate, sizes.kept),
       part(offsetof(Args, words), kUpdate, sizes.words),
       part(offsetof(Args, counters), kUpdate, sizes.counters),
       part(offsetof(Args, indices), kUpdate, out), part(offsetof(Args, count), kWrite, 8),
       unused(offsetof(Args, boxes)), unused(offsetof(Args, scores)), unused(offsetof(Args, idxs)),
       unused(offsetof(Args, keys)), unused(offsetof(Args, score_rows))});
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

// Nothing waits for the host. Results go to `indices` (max_output of them) and `count`, which may lie in host memory that
// the device can write.
void launch(const CudaPlace& cuda_place, const NmsPlan& p, const Tensor& indices,
            std::int64_t* count) {
  suppress(cuda_place, p, order(cuda_place, p, indices, count));
}

// The one place that waits: the size of the result depends on the data.
Tensor cuda_sized(const char* op, const NmsPlan& p) {
  Tensor indices = empty(p.boxes, ScalarType::Long, {p.args.n});
  if (p.args.n == 0) return indices;
  const CudaPlace cuda_place(p.boxes);
  constexpr const char* kWayOut = "Use torchkiln.ops.nms_padded, whose result has a fixed size";
  check(torchkiln_capture_guard(cuda_place.device(), cuda_place.stream(), op, kWayOut));
  std::int64_t* count = host_number();
  launch(cuda_place, p, indices, count);
  check(torchkiln_synchronize(cuda_place.device(), cuda_place.stream(), op, kWayOut));
  return torch::stable::narrow(indices, 0, 0, *static_cast<volatile std::int64_t*>(count));
}

Tensor nms_cuda(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return cuda_sized("nms", plan_nms("nms", boxes, scores, std::nullopt, iou_threshold));
}

Tensor batched_nms_cuda(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                        double iou_threshold) {
  return cuda_sized("batched_nms", plan_nms("batched_nms", boxes, scores, idxs, iou_threshold));
}

std::tuple<Tensor, Tensor> nms_padded_cuda(const Tensor& boxes, const Tensor& scores,
                                           double iou_threshold, std::int64_t max_output,
                                           const std::optional<Tensor>& idxs) {
  const NmsPlan p = plan_nms("nms_padded", boxes, scores, idxs, iou_threshold);
  check_max_output("nms_padded", max_output);
  Tensor indices = empty(boxes, ScalarType::Long, {max_output});
  if (p.args.n == 0) {
    torch::stable::fill_(indices, -1);
    return {indices, zeros(boxes, ScalarType::Long, {})};
  }
  const Tensor count = empty(boxes, ScalarType::Long, {});
  launch(CudaPlace(boxes), p, indices, mutable_data<std::int64_t>(count));
  return {indices, count};
}

}  // namespace

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
  const Statics statics{kernel_type(p.boxes.scalar_type()), args.idxs != nullptr ? 1 : 0};
  sort_kernel.run(
      cuda_place, statics, {args.n}, args,
      {boxes, scores, reads(offsetof(Args, idxs), args.n * args.idx_bytes),
       part(offsetof(Args, keys), kWrite, sizes.keys), sorted_boxes, sorted_rows, first, score_rows,
       score_ranks, part(offsetof(Args, kept), kWrite, sizes.kept),
       part(offsetof(Args, words), kWrite, sizes.words),
       part(offsetof(Args, counters), kWrite, sizes.counters),
       part(offsetof(Args, indices), kWrite, args.max_output * 8), unused(offsetof(Args, count))});
  if (args.n > nms::kTile) {
    merge_kernel.run(
        cuda_place, statics, {args.n}, args,
        {boxes, scores, part(offsetof(Args, keys), kRead, sizes.keys), sorted_boxes, sorted_rows,
         first, score_rows, score_ranks, unused(offsetof(Args, idxs)), unused(offsetof(Args, kept)),
         unused(offsetof(Args, words)), unused(offsetof(Args, counters)),
         unused(offsetof(Args, indices)), unused(offsetof(Args, count))});
  }
  return ordered;
}

// One per thread, never given back: a call has read its number before the thread can make another.
std::int64_t* host_number() {
  thread_local const Tensor* const number = new Tensor(
      torch::stable::empty({1}, ScalarType::Long, std::nullopt,
                           torch::stable::Device(torch::headeronly::DeviceType::CPU), true));
  return mutable_data<std::int64_t>(*number);
}

NmsPlan plan_nms(const char* op, const Tensor& boxes, const Tensor& scores,
                 const std::optional<Tensor>& idxs, double iou_threshold) {
  check_rows(op, "boxes", boxes, 4);
  check_dim(op, "scores", scores, 1, "(N,)");
  check_same_dtype(op, "scores", scores, "boxes", boxes);
  check_same_device(op, "scores", scores, "boxes", boxes);
  check_shape(op, "scores", scores, {boxes.size(0)});
  if (idxs.has_value()) {
    class_bytes(op, *idxs);
    check_dim(op, "idxs", *idxs, 1, "(N,)");
    check_same_device(op, "idxs", *idxs, "boxes", boxes);
    check_shape(op, "idxs", *idxs, {boxes.size(0)});
  }
  check_not_nan(op, "iou_threshold", iou_threshold);
  if (boxes.size(0) >= kMaxBoxes)
    fail(TORCHKILN_ERROR_VALUE, op, "boxes", "have fewer than 2^30 rows", text(boxes));
  NmsPlan p{.boxes = as_contiguous(boxes),
            .scores = as_contiguous(scores),
            .idxs = idxs.has_value() ? as_contiguous(*idxs) : Tensor(),
            .args = {}};
  p.args.boxes = p.boxes.const_data_ptr();
  p.args.scores = p.scores.const_data_ptr();
  p.args.n = boxes.size(0);
  p.args.iou_threshold = iou_threshold;
  if (idxs.has_value()) {
    p.args.idxs = p.idxs.const_data_ptr();
    p.args.idx_bytes = class_bytes(op, p.idxs);
  }
  return p;
}

std::int64_t class_bytes(const char* op, const Tensor& idxs) {
  switch (idxs.scalar_type()) {
    case ScalarType::Byte:
    case ScalarType::Char:
      return 1;
    case ScalarType::Short:
      return 2;
    case ScalarType::Int:
      return 4;
    case ScalarType::Long:
      return 8;
    default:
      fail(TORCHKILN_ERROR_TYPE, op, "idxs", "be an integer tensor", text(idxs.scalar_type()),
           "Convert it with idxs.long()");
  }
}

void check_max_output(const char* op, std::int64_t max_output) {
  if (max_output >= 0) return;
  fail(TORCHKILN_ERROR_VALUE, op, "max_output", "be at least 0", std::to_string(max_output));
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
  m.def("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor");
  m.def(
      "nms_padded(Tensor boxes, Tensor scores, float iou_threshold, int max_output, "
      "Tensor? idxs=None) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) {
  m.impl("nms", TORCH_BOX(&torchkiln::bindings::nms_cuda));
  m.impl("batched_nms", TORCH_BOX(&torchkiln::bindings::batched_nms_cuda));
  m.impl("nms_padded", TORCH_BOX(&torchkiln::bindings::nms_padded_cuda));
}
