// torchvision's operator namespace, filled on request: its schemas where torchvision's own library could not be loaded,
// and our kernels for the operators that we have. Nothing is registered when this library is loaded.
// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "torchkiln/torchkiln.h"

// Since torch 2.13; older versions keep the sentence of a failed call to themselves.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace torchkiln::bindings {
namespace {

using Boxed = void (*)(StableIValue* stack, std::uint64_t n_args, std::uint64_t n_returns);
using torch::stable::detail::from;
using torch::stable::detail::to;

// What torch's own messages name as the place of a registration.
constexpr const char* kOrigin = "torchkiln/bindings/compat/torchvision.cpp";

const char* torch_sentence() {
  const char* text = torch_exception_get_what_without_backtrace != nullptr
                         ? torch_exception_get_what_without_backtrace()
                         : nullptr;
  return text != nullptr ? text : "torch refused the call without giving a reason";
}

// Replaces the arguments on the stack by the results of one of our operators.
void redispatch(const char* name, StableIValue* stack) {
  torchkiln_set_error(TORCHKILN_ERROR_NONE, "", "");
  if (torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION) == 0) return;
  const torchkiln_error* error = torchkiln_last_error();
  throw std::runtime_error(error->kind != TORCHKILN_ERROR_NONE ? error->message : torch_sentence());
}

// nms(dets, scores, iou_threshold)
void nms(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const double offset = 0;
  std::array ours{stack[0],
                  stack[1],
                  stack[2],
                  from(offset),
                  from(std::optional<double>()),
                  from(std::optional<std::int64_t>())};
  redispatch("torchkiln::nms", ours.data());
  stack[0] = ours[0];
}

// roi_align(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned)
void roi_align(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const std::int64_t pool_mode = 0;  // average
  std::array ours{stack[0], stack[1], stack[3], stack[4],
                  stack[2], stack[5], stack[6], from(pool_mode)};
  redispatch("torchkiln::roi_align", ours.data());
  stack[0] = ours[0];
}

// _roi_align_backward(grad, rois, spatial_scale, pooled_height, pooled_width, batch_size, channels, height, width,
// sampling_ratio, aligned)
void roi_align_backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const bool channels_last = false;  // as torchvision's fake says
  std::array ours{stack[0],  stack[1],           from(std::optional<torch::stable::Tensor>()),
                  stack[5],  stack[6],           stack[7],
                  stack[8],  stack[2],           stack[9],
                  stack[10], from(channels_last)};
  redispatch("torchkiln::_roi_align_backward", ours.data());
  stack[0] = ours[0];
}

// One of our pooling operators that returns two results.
void mapped(std::array<StableIValue, 8> ours, StableIValue* stack) {
  redispatch("torchkiln::_ps_roi_pool_mapped", ours.data());
  stack[0] = ours[0];
  stack[1] = ours[1];
}

constexpr std::int64_t kSamples = 0, kCells = 1;
constexpr bool kAsTorchvision = true, kChannelsFirst = false;

// ps_roi_align(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio)
void ps_roi_align(StableIValue* stack, std::uint64_t, std::uint64_t) {
  mapped({stack[0], stack[1], stack[3], stack[4], stack[2], stack[5], from(kSamples),
          from(kAsTorchvision)},
         stack);
}

// ps_roi_pool(input, rois, spatial_scale, pooled_height, pooled_width)
void ps_roi_pool(StableIValue* stack, std::uint64_t, std::uint64_t) {
  mapped({stack[0], stack[1], stack[3], stack[4], stack[2], from(std::int64_t{-1}), from(kCells),
          from(kAsTorchvision)},
         stack);
}

// The gradient of both; `at` is where batch_size stands. We know the channels of bins without being told.
void ps_backward(StableIValue* stack, std::size_t at, StableIValue ratio, std::int64_t pooling) {
  aoti_torch_delete_tensor_object(to<AtenTensorHandle>(stack[2]));
  std::array ours{stack[0],      stack[1], stack[at], stack[at + 1], stack[at + 2],
                  stack[at + 3], stack[3], ratio,     from(pooling), from(kChannelsFirst)};
  redispatch("torchkiln::_ps_roi_pool_backward", ours.data());
  stack[0] = ours[0];
}

// _ps_roi_align_backward(grad, rois, channel_mapping, spatial_scale, pooled_height, pooled_width, sampling_ratio,
// batch_size, channels, height, width)
void ps_roi_align_backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
  ps_backward(stack, 7, stack[6], kSamples);
}

// _ps_roi_pool_backward(grad, rois, channel_mapping, spatial_scale, pooled_height, pooled_width, batch_size, channels,
// height, width)
void ps_roi_pool_backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
  ps_backward(stack, 6, from(std::int64_t{-1}), kCells);
}

// _cuda_version(): built without CUDA, as torchvision's CPU builds say.
void cuda_version(StableIValue* stack, std::uint64_t, std::uint64_t) {
  stack[0] = from(std::int64_t{-1});
}

struct Operator {
  const char* name;
  const char* schema;  // as torchvision registers it
  Boxed kernel;        // null: torchkiln has no such operator yet
};

constexpr std::array kOperators{
    Operator{"nms", "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", nms},
    Operator{"roi_align",
             "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
             "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
             roi_align},
    Operator{"_roi_align_backward",
             "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, "
             "SymInt pooled_height, SymInt pooled_width, SymInt batch_size, SymInt channels, "
             "SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
             roi_align_backward},
    Operator{"roi_pool",
             "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
             "SymInt pooled_width) -> (Tensor, Tensor)",
             nullptr},
    Operator{"_roi_pool_backward",
             "_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, "
             "SymInt pooled_height, SymInt pooled_width, SymInt batch_size, SymInt channels, "
             "SymInt height, SymInt width) -> Tensor",
             nullptr},
    Operator{"ps_roi_align",
             "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
             "SymInt pooled_width, int sampling_ratio) -> (Tensor, Tensor)",
             ps_roi_align},
    Operator{"_ps_roi_align_backward",
             "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, "
             "float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
             "SymInt batch_size, SymInt channels, SymInt height, SymInt width) -> Tensor",
             ps_roi_align_backward},
    Operator{"ps_roi_pool",
             "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
             "SymInt pooled_width) -> (Tensor, Tensor)",
             ps_roi_pool},
    Operator{"_ps_roi_pool_backward",
             "_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, "
             "float spatial_scale, SymInt pooled_height, SymInt pooled_width, SymInt batch_size, "
             "SymInt channels, SymInt height, SymInt width) -> Tensor",
             ps_roi_pool_backward},
    Operator{"deform_conv2d",
             "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
             "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, "
             "SymInt dilation_w, SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor",
             nullptr},
    Operator{"_deform_conv2d_backward",
             "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, "
             "Tensor mask, Tensor bias, SymInt stride_h, SymInt stride_w, SymInt pad_h, "
             "SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
             "SymInt offset_groups, bool use_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
             nullptr},
    Operator{"qnms", "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor", nullptr},
    Operator{"qroi_align",
             "qroi_align(Tensor input, Tensor rois, float input_scale, int input_zero_point, "
             "float rois_scale, int rois_zero_point, float spatial_scale, SymInt pooled_height, "
             "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor",
             nullptr},
    Operator{"box_iou_rotated", "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor", nullptr},
    Operator{"_cuda_version", "_cuda_version() -> int", cuda_version},
};

// All tensors stand at the front in these schemas; the stack owns them.
constexpr std::uint64_t tensor_arguments(std::string_view schema) {
  std::uint64_t count = 0;
  for (std::size_t at = schema.find("Tensor "); at != std::string_view::npos;
       at = schema.find("Tensor ", at + 1))
    ++count;
  return count;
}

std::array<std::atomic<std::int64_t>, kOperators.size()> calls{};

// What torch calls for row I: counts, then runs our kernel or says that there is none.
template <std::size_t I>
void answer(StableIValue* stack, std::uint64_t n_args, std::uint64_t n_returns) {
  constexpr const Operator& op = kOperators[I];
  calls[I].fetch_add(1, std::memory_order_relaxed);
  if constexpr (op.kernel != nullptr) {
    op.kernel(stack, n_args, n_returns);
  } else {
    for (std::uint64_t i = 0; i < tensor_arguments(op.schema); ++i)
      aoti_torch_delete_tensor_object(to<AtenTensorHandle>(stack[i]));
    throw std::runtime_error(
        std::string("torchvision::") + op.name +
        ": torchkiln does not provide this operator yet. Install a torchvision "
        "built for this torch to use it");
  }
}

template <std::size_t... I>
constexpr std::array<Boxed, sizeof...(I)> answers(std::index_sequence<I...>) {
  return {&answer<I>...};
}
constexpr auto kAnswers = answers(std::make_index_sequence<kOperators.size()>());

const Operator* row(std::int32_t index) {
  return index >= 0 && static_cast<std::size_t>(index) < kOperators.size()
             ? &kOperators[static_cast<std::size_t>(index)]
             : nullptr;
}

// Gives the registration to the caller when it worked, else takes it back and returns torch's sentence.
const char* finish(AOTITorchError code, TorchLibraryHandle library, void** registration) {
  if (code == 0) {
    *registration = library;
    return nullptr;
  }
  const char* sentence = torch_sentence();
  aoti_torch_delete_library_object(library);
  return sentence;
}

}  // namespace
}  // namespace torchkiln::bindings

// For torchkiln.compat.torchvision, which decides what to register and keeps the registrations.
extern "C" {

// Name of row `index`, whether it runs on an operator of ours, and how often ours was called; null past the end.
TORCHKILN_API const char* torchkiln_torchvision_operator(std::int32_t index, std::int32_t* provided,
                                                         std::int64_t* calls) {
  namespace tk = torchkiln::bindings;
  const tk::Operator* op = tk::row(index);
  if (op == nullptr) return nullptr;
  *provided = op->kernel != nullptr && op->kernel != tk::cuda_version;
  *calls = tk::calls[static_cast<std::size_t>(index)].load(std::memory_order_relaxed);
  return op->name;
}

// Registers the schema of row `index`, which must not exist. Null, or why it failed.
TORCHKILN_API const char* torchkiln_torchvision_define(std::int32_t index, void** registration) {
  namespace tk = torchkiln::bindings;
  const tk::Operator* op = tk::row(index);
  TorchLibraryHandle library = nullptr;
  if (op == nullptr ||
      aoti_torch_library_init_fragment("torchvision", tk::kOrigin, __LINE__, &library) != 0)
    return tk::torch_sentence();
  return tk::finish(aoti_torch_library_def(library, op->schema), library, registration);
}

// Registers row `index` for a dispatch key, over what is registered there. Null, or why it failed.
TORCHKILN_API const char* torchkiln_torchvision_implement(std::int32_t index, const char* key,
                                                          void** registration) {
  namespace tk = torchkiln::bindings;
  const tk::Operator* op = tk::row(index);
  TorchLibraryHandle library = nullptr;
  if (op == nullptr ||
      aoti_torch_library_init_impl("torchvision", key, tk::kOrigin, __LINE__, &library) != 0)
    return tk::torch_sentence();
  return tk::finish(
      torch_library_impl(library, op->name, tk::kAnswers[static_cast<std::size_t>(index)],
                         TORCH_ABI_VERSION),
      library, registration);
}

// Takes a registration back; what it covered answers again.
TORCHKILN_API void torchkiln_torchvision_release(void* registration) {
  aoti_torch_delete_library_object(static_cast<TorchLibraryHandle>(registration));
}
}
