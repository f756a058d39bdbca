// Stream lookup and the allocator callbacks.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/support/cuda.h"

#include <dlfcn.h>

#include <array>
#include <memory>
#include <stdexcept>

namespace torchkiln::bindings {
namespace {

using CurrentStream = AOTITorchError (*)(std::int32_t device, void** stream);

// libtorch_cuda exists only in CUDA builds of torch, so it cannot be linked; it is loaded whenever a CUDA tensor is.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  if (symbol == nullptr) {
    throw std::runtime_error(
        "torchkiln: a CUDA tensor was given but libtorch_cuda.so is not loaded. Install a CUDA "
        "build of torch");
  }
  return reinterpret_cast<CurrentStream>(symbol);
}

void* current_stream(std::int32_t device) {
  static const CurrentStream function = find_current_stream();
  void* stream = nullptr;
  check_torch(function(device, &stream), "aoti_torch_get_current_cuda_stream");
  return stream;
}

// Memory for the engine from torch's caching allocator, so that it is stream-ordered and counted like any other.
void* allocate(void* context, std::uint64_t bytes, void** owner) {
  try {
    const auto device = static_cast<std::int32_t>(reinterpret_cast<std::intptr_t>(context));
    const std::int64_t size = static_cast<std::int64_t>(bytes), stride = 1;
    AtenTensorHandle handle = nullptr;
    if (aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(),
                                 aoti_torch_device_type_cuda(), device, &handle) != 0) {
      return nullptr;
    }
    auto tensor = std::make_unique<Tensor>(handle);
    void* pointer = tensor->mutable_data_ptr();
    *owner = tensor.release();
    return pointer;
  } catch (...) {
    return nullptr;  // the engine treats it as "no memory" and says so
  }
}

void release(void*, void* owner) { delete static_cast<Tensor*>(owner); }

constexpr std::size_t kMaxDevices = 64;

// One allocator per device, whose context is the device's index.
const torchkiln_allocator* allocator_for(std::int32_t device) {
  static const auto table = [] {
    std::array<torchkiln_allocator, kMaxDevices> result{};
    for (std::size_t i = 0; i < kMaxDevices; ++i) {
      result.at(i) = {&allocate, &release, reinterpret_cast<void*>(i)};
    }
    return result;
  }();
  return &table.at(static_cast<std::size_t>(device));
}

}  // namespace

CudaPlace::CudaPlace(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  place_.device = tensor.get_device_index();
  place_.stream = current_stream(place_.device);
  place_.allocator = allocator_for(place_.device);
}

const Device& CudaPlace::facts() const {
  const Device* device = torchkiln_device_facts(place_.device);
  if (device == nullptr) throw Error(*torchkiln_last_error());
  return *device;
}

}  // namespace torchkiln::bindings
