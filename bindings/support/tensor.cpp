// Texts for error messages, and allocation.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/support/tensor.h"

#include <array>
#include <stdexcept>
#include <vector>

// Exists from torch 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace torchkiln::bindings {

void check_torch(AOTITorchError code, const char* call) {
  if (code == 0) return;
  const char* what = torch_exception_get_what_without_backtrace != nullptr
                         ? torch_exception_get_what_without_backtrace()
                         : "torch printed the reason";
  throw std::runtime_error(std::string(call) + " failed: " + what);
}

std::string text(const Tensor& tensor) {
  std::string result = "(";
  for (const std::int64_t size : shape_of(tensor)) {
    if (result.size() > 1) result += ", ";
    result += std::to_string(size);
  }
  if (tensor.dim() == 1) result += ",";
  return result + ")";
}

std::string text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  const std::string index = std::to_string(tensor.get_device_index());
  return tensor.is_cuda() ? "cuda:" + index : "device " + index + " of another type";
}

Tensor empty_strided(const Tensor& like, ScalarType dtype, Shape shape, Shape strides) {
  std::int32_t device_type = 0;
  check_torch(aoti_torch_get_device_type(like.get(), &device_type), "aoti_torch_get_device_type");
  AtenTensorHandle handle = nullptr;
  const auto shim_dtype =
      torch::stable::detail::to<std::int32_t>(torch::stable::detail::from(dtype));
  check_torch(aoti_torch_empty_strided(static_cast<std::int64_t>(shape.size()), shape.data(),
                                       strides.data(), shim_dtype, device_type,
                                       like.get_device_index(), &handle),
              "aoti_torch_empty_strided");
  return Tensor(handle);
}

Tensor empty(const Tensor& like, ScalarType dtype, Shape shape) {
  std::array<std::int64_t, 8> strides{};
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides.at(i) = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  return empty_strided(like, dtype, shape, Shape(strides.data(), shape.size()));
}

Tensor zeros(const Tensor& like, ScalarType dtype, Shape shape) {
  return torch::stable::new_zeros(like, {shape.data(), shape.size()}, dtype);
}

std::uint64_t extent_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  std::int64_t last = 0;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (std::size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return static_cast<std::uint64_t>(last + 1) * element_size(tensor.scalar_type());
}

}  // namespace torchkiln::bindings
