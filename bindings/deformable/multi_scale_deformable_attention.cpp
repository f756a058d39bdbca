// Multi-scale deformable attention: schemas, checks and shapes. (The CPU half is multi_scale_deformable_attention_cpu.cpp,
// the launches are in multi_scale_deformable_attention_cuda.cpp.)
// SPDX-License-Identifier: Apache-2.0
#include "bindings/deformable/multi_scale_deformable_attention.h"

#include <string>
#include <tuple>

namespace torchkiln::bindings {
namespace {

// What the arguments of the two operators are called.
struct Names {
  const char* op;
  const char* places;
  const char* weights;
};
constexpr Names kPlain = {"multi_scale_deformable_attention", "sampling_locations",
                          "attention_weights"};
constexpr Names kFused = {"multi_scale_deformable_attention_fused", "sampling_offsets",
                          "attention_logits"};

// Pixels, samples of a row, and bytes from one pixel to the next are counted in 32 bits.
constexpr std::int64_t kMost = std::int64_t{1} << 27;

void check_most(const Names& names, const char* argument, const char* what, std::int64_t size) {
  if (size <= kMost) return;
  fail(TORCHKILN_ERROR_VALUE, names.op, argument,
       std::string("have at most ") + std::to_string(kMost) + " " + what, std::to_string(size));
}

void check_integers(const Names& names, const char* argument, const Tensor& tensor,
                    const Tensor& value) {
  check_same_device(names.op, argument, tensor, "value", value);
  if (tensor.scalar_type() == ScalarType::Long) return;
  fail(TORCHKILN_ERROR_TYPE, names.op, argument, "be an int64 tensor", text(tensor.scalar_type()),
       std::string("Convert it with ") + argument + ".long()");
}

void check_levels(const Names& names, const MsdaPlan& p) {
  check_integers(names, "spatial_shapes", p.shapes, p.value);
  if (p.shapes.dim() != 2 || p.shapes.size(1) != 2) {
    fail(TORCHKILN_ERROR_VALUE, names.op, "spatial_shapes", "have shape (L, 2)", text(p.shapes));
  }
  check_integers(names, "level_start_index", p.starts, p.value);
  check_shape(names.op, "level_start_index", p.starts, {p.shapes.size(0)});
  if (!p.value.is_cpu()) return;
  const auto* shapes = data<i64>(p.shapes);
  const auto* starts = data<i64>(p.starts);
  for (std::int64_t level = 0; level < p.shapes.size(0); ++level) {
    const i64 h = shapes[2 * level], w = shapes[2 * level + 1], start = starts[level];
    if (h >= 0 && w >= 0 && h <= kMost && w <= kMost && start >= 0 &&
        h * w <= p.value.size(1) - start)
      continue;
    fail(TORCHKILN_ERROR_VALUE, names.op, "spatial_shapes",
         "describe levels within the " + std::to_string(p.value.size(1)) + " pixels of value",
         std::to_string(h) + " by " + std::to_string(w) + " pixels from " + std::to_string(start) +
             " on, for level " + std::to_string(level));
  }
}

// Of the dtype of the value, or float32, which holds places more precisely than a half type.
void check_places(const Names& names, const MsdaPlan& p) {
  const Tensor& places = p.places;
  check_floating(names.op, names.places, places);
  check_same_device(names.op, names.places, places, "value", p.value);
  if (places.scalar_type() != p.value.scalar_type() &&
      (places.scalar_type() != ScalarType::Float || p.value.scalar_type() == ScalarType::Double)) {
    const bool half =
        p.value.scalar_type() == ScalarType::Half || p.value.scalar_type() == ScalarType::BFloat16;
    fail(TORCHKILN_ERROR_TYPE, names.op, names.places,
         "have the dtype of value (" + text(p.value.scalar_type()) + ")" +
             (half ? " or float32" : ""),
         text(places.scalar_type()));
  }
  if (places.dim() != 6 || places.size(5) != 2) {
    fail(TORCHKILN_ERROR_VALUE, names.op, names.places, "have shape (B, Q, M, L, P, 2)",
         text(places));
  }
  check_shape(
      names.op, names.places, places,
      {p.value.size(0), places.size(1), p.value.size(2), p.shapes.size(0), places.size(4), 2});
  check_same_dtype(names.op, names.weights, p.weights, names.places, places);
  check_same_device(names.op, names.weights, p.weights, "value", p.value);
  check_shape(names.op, names.weights, p.weights,
              {places.size(0), places.size(1), places.size(2), places.size(3), places.size(4)});
}

void check_references(const Names& names, const MsdaPlan& p, const Tensor& references) {
  check_same_dtype(names.op, "reference_points", references, names.places, p.places);
  check_same_device(names.op, "reference_points", references, "value", p.value);
  const auto n = references.dim() == 4 ? references.size(3) : 0;
  if (n != 2 && n != 4) {
    fail(TORCHKILN_ERROR_VALUE, names.op, "reference_points",
         "have shape (B, Q, L, 2) or (B, Q, L, 4)", text(references));
  }
  check_shape(names.op, "reference_points", references,
              {p.places.size(0), p.places.size(1), p.places.size(3), n});
}

void check_mask(const Names& names, const MsdaPlan& p, const Tensor& mask) {
  check_same_device(names.op, "padding_mask", mask, "value", p.value);
  if (mask.scalar_type() != ScalarType::Bool) {
    fail(TORCHKILN_ERROR_TYPE, names.op, "padding_mask", "be a bool tensor",
         text(mask.scalar_type()));
  }
  check_shape(names.op, "padding_mask", mask, {p.value.size(0), p.value.size(1)});
}

msda::Args args_of(const MsdaPlan& p) {
  const auto pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; };
  return {.value = p.value.const_data_ptr(),
          .shapes = data<i64>(p.shapes),
          .starts = data<i64>(p.starts),
          .mask = static_cast<const u8*>(pointer(p.mask)),
          .places = p.places.const_data_ptr(),
          .weights = p.weights.const_data_ptr(),
          .references = pointer(p.references),
          .output = nullptr,
          .grad_value = nullptr,
          .grad_places = nullptr,
          .grad_weights = nullptr,
          .placed = nullptr,
          .ends = nullptr,
          .ranks = nullptr,
          .samples = nullptr,
          .sums = nullptr,
          .seams = nullptr,
          .b = p.value.size(0),
          .s = p.value.size(1),
          .m = p.value.size(2),
          .d = p.value.size(3),
          .q = p.places.size(1),
          .l = p.places.size(3),
          .p = p.places.size(4),
          .reference_size = p.references.defined() ? p.references.size(3) : 0,
          .positions = 0};
}

// x and y of a place are read at once.
Tensor aligned(const Tensor& places) {
  const auto pair = 2 * static_cast<std::uintptr_t>(element_size(places.scalar_type()));
  if (reinterpret_cast<std::uintptr_t>(places.const_data_ptr()) % pair == 0) return places;
  Tensor copy = empty(places, places.scalar_type(), shape_of(places));
  torch::stable::copy_(copy, places);
  return copy;
}

// `output` stays undefined.
MsdaPlan plan_inputs(const Names& names, const Tensor& value, const Tensor& shapes,
                     const Tensor& starts, const Tensor& places, const Tensor& weights,
                     const std::optional<Tensor>& references, const std::optional<Tensor>& mask) {
  MsdaPlan p{.op = names.op,
             .value = value,
             .shapes = shapes,
             .starts = starts,
             .places = places,
             .weights = weights,
             .references = Tensor(),
             .mask = Tensor(),
             .output = Tensor(),
             .args = {}};
  check_floating(names.op, "value", value);
  check_dim(names.op, "value", value, 4, "(B, S, M, D)");
  p.shapes = as_contiguous(shapes);
  p.starts = as_contiguous(starts);
  check_levels(names, p);
  check_places(names, p);
  if (references.has_value()) {
    check_references(names, p, *references);
    p.references = as_contiguous(*references);
  }
  if (mask.has_value()) {
    check_mask(names, p, *mask);
    p.mask = as_contiguous(*mask);
  }
  check_most(names, "value", "pixels", value.size(1));
  check_most(names, "value", "channels of all heads", value.size(2) * value.size(3));
  check_most(names, names.places, "points of all queries or levels",
             std::max(places.size(1), places.size(3)) * places.size(4));
  p.value = as_contiguous(value);
  p.places = aligned(as_contiguous(places));
  p.weights = as_contiguous(weights);
  p.args = args_of(p);
  return p;
}

template <bool kCuda>
Tensor forward(const Names& names, const Tensor& value, const Tensor& shapes, const Tensor& starts,
               const Tensor& places, const Tensor& weights, const std::optional<Tensor>& references,
               const std::optional<Tensor>& mask) {
  MsdaPlan p = plan_inputs(names, value, shapes, starts, places, weights, references, mask);
  p.output = empty(value, value.scalar_type(), {p.args.b, p.args.q, p.args.m * p.args.d});
  p.args.output = p.output.mutable_data_ptr();
  if (p.is_empty()) {
    torch::stable::zero_(p.output);
  } else if constexpr (kCuda) {
    run_msda_cuda(p);
  } else {
    run_msda_cpu(p);
  }
  return p.output;
}

template <bool kCuda>
Tensor attend(const Tensor& value, const Tensor& spatial_shapes, const Tensor& level_start_index,
              const Tensor& sampling_locations, const Tensor& attention_weights,
              const std::optional<Tensor>& padding_mask, bool) {
  return forward<kCuda>(kPlain, value, spatial_shapes, level_start_index, sampling_locations,
                        attention_weights, std::nullopt, padding_mask);
}

template <bool kCuda>
Tensor attend_fused(const Tensor& value, const Tensor& spatial_shapes,
                    const Tensor& level_start_index, const Tensor& reference_points,
                    const Tensor& sampling_offsets, const Tensor& attention_logits,
                    const std::optional<Tensor>& padding_mask, bool) {
  return forward<kCuda>(kFused, value, spatial_shapes, level_start_index, sampling_offsets,
                        attention_logits, reference_points, padding_mask);
}

template <bool kCuda>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value,
                                            const Tensor& shapes, const Tensor& starts,
                                            const Tensor& places, const Tensor& weights,
                                            const std::optional<Tensor>& references,
                                            const std::optional<Tensor>& mask, bool positions,
                                            bool deterministic) {
  const Names& names = references.has_value() ? kFused : kPlain;
  MsdaPlan p = plan_inputs(names, value, shapes, starts, places, weights, references, mask);
  check_same_dtype(names.op, "grad_output", grad_output, "value", value);
  check_same_device(names.op, "grad_output", grad_output, "value", value);
  check_shape(names.op, "grad_output", grad_output, {p.args.b, p.args.q, p.args.m * p.args.d});
  p.output = as_contiguous(grad_output);
  p.args.output = const_cast<void*>(p.output.const_data_ptr());
  p.args.positions = positions;
  MsdaGradients g = empty_gradients(p, positions);
  if (p.is_empty()) {
    for (Tensor* tensor : {&g.value, &g.places, &g.weights}) torch::stable::zero_(*tensor);
  } else if constexpr (kCuda) {
    g.value = run_msda_backward_cuda(p, g, deterministic);
  } else {
    run_msda_backward_cpu(p, g);
  }
  return {g.value, g.places, g.weights};
}

}  // namespace

MsdaGradients empty_gradients(const MsdaPlan& p, bool positions) {
  const ScalarType wide =
      p.value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const ScalarType dtype = p.places.scalar_type();
  return {.value = empty(p.value, p.value.scalar_type(), shape_of(p.value)),
          .places = empty(p.places, positions ? wide : dtype, shape_of(p.places)),
          .weights = empty(p.weights, dtype, shape_of(p.weights))};
}

}  // namespace torchkiln::bindings

STABLE_TORCH_LIBRARY_FRAGMENT(torchkiln, m) {
  m.def(
      "multi_scale_deformable_attention(Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor sampling_locations, Tensor attention_weights, "
      "Tensor? padding_mask=None, bool deterministic=False) -> Tensor");
  m.def(
      "multi_scale_deformable_attention_fused(Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor reference_points, Tensor sampling_offsets, "
      "Tensor attention_logits, Tensor? padding_mask=None, bool deterministic=False) -> Tensor");
  m.def(
      "_multi_scale_deformable_attention_backward(Tensor grad_output, Tensor value, "
      "Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights, Tensor? reference_points, Tensor? padding_mask, bool positions, "
      "bool deterministic) -> (Tensor, Tensor, Tensor)");
}
#define TORCHKILN_MSDA_IMPL(m, kCuda)                                                         \
  m.impl("multi_scale_deformable_attention", TORCH_BOX(&torchkiln::bindings::attend<kCuda>)); \
  m.impl("multi_scale_deformable_attention_fused",                                            \
         TORCH_BOX(&torchkiln::bindings::attend_fused<kCuda>));                               \
  m.impl("_multi_scale_deformable_attention_backward",                                        \
         TORCH_BOX(&torchkiln::bindings::backward<kCuda>))
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CPU, m) { TORCHKILN_MSDA_IMPL(m, false); }
STABLE_TORCH_LIBRARY_IMPL(torchkiln, CUDA, m) { TORCHKILN_MSDA_IMPL(m, true); }
