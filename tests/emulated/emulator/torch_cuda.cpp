// CUDA tensors for a torch without CUDA: memory of the emulated GPU, and torch's own CPU code for everything that is done to
// them. It has the file name and the one function that our operators look for in torch's CUDA library.
// SPDX-License-Identifier: Apache-2.0
#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::IValue;
using at::Tensor;
using torch::jit::Stack;

c10::Device gpu() { return {c10::kCUDA, 0}; }

// ---- the device ----------------------------------------------------------------------------------------------------

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kCUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return gpu(); }
  c10::Device getDevice() const override { return gpu(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, gpu()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

void* driver_function(const char* name) {
  static void* const driver = ::dlopen("libcuda.so.1", RTLD_NOW);
  void* function = driver != nullptr ? ::dlsym(driver, name) : nullptr;
  TORCH_CHECK(function != nullptr, "the emulated GPU's libcuda.so.1 must be found first");
  return function;
}

// Bytes of all tensors, and the most there have been.
struct Held {
  std::mutex mutex;
  std::unordered_map<void*, std::size_t> bytes;
  std::size_t now = 0, peak = 0;
};
Held& held() {
  static Held& instance = *new Held;
  return instance;
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    static const auto function =
        reinterpret_cast<void* (*)(std::size_t)>(driver_function("fake_cuda_allocate"));
    void* memory = bytes > 0 ? function(bytes) : nullptr;
    if (memory != nullptr) {
      const std::scoped_lock lock(held().mutex);
      held().bytes[memory] = bytes;
      held().now += bytes;
      held().peak = std::max(held().peak, held().now);
    }
    return {memory, memory, &release, gpu()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }

 private:
  static void release(void* memory) {
    static const auto function =
        reinterpret_cast<void (*)(void*)>(driver_function("fake_cuda_release"));
    if (memory == nullptr) return;
    {
      const std::scoped_lock lock(held().mutex);
      const auto found = held().bytes.find(memory);
      if (found != held().bytes.end()) {
        held().now -= found->second;
        held().bytes.erase(found);
      }
    }
    function(memory);
  }
};

DeviceMemory& device_memory() {
  static auto& allocator = *new DeviceMemory;
  return allocator;
}

// Every page of the host can be read by the emulated GPU.
struct PinnedMemory final : at::HostAllocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    return c10::GetCPUAllocator()->allocate(bytes);
  }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedMemory& pinned_memory() {
  static auto& allocator = *new PinnedMemory;
  return allocator;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Device getDeviceFromPtr(void*) const override { return gpu(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_memory(); }
};

[[maybe_unused]] const bool registered = [] {
  at::CUDAHooksRegistry()->Register("CUDAHooks", [](at::CUDAHooksArgs args) {
    return std::unique_ptr<at::CUDAHooksInterface>(new Hooks(args));
  });
  at::setHostAllocator(c10::kCUDA, &pinned_memory());
  c10::SetAllocator(c10::kCUDA, &device_memory());
  return true;
}();

// ---- the same memory, seen as the other device's -------------------------------------------------------------------

Tensor seen_through(const Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                         c10::DispatchKeySet(key), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                    tensor.storage_offset());
  view._set_conj(tensor.is_conj());
  view._set_neg(tensor.is_neg());
  return view;
}

Tensor on_host(const Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  auto* owner = new c10::Storage(storage);
  c10::DataPtr memory(
      storage.mutable_data(), owner, [](void* held) { delete static_cast<c10::Storage*>(held); },
      c10::kCPU);
  return seen_through(tensor,
                      c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(),
                                   std::move(memory), c10::GetCPUAllocator(), true),
                      c10::DispatchKey::CPU);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory(),
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<c10::Device>, std::optional<bool>,
             std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &device_memory(),
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

Tensor& copy_into(Tensor& self, const Tensor& source, bool) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (self.numel() == 0) return self;
  Tensor to = self.is_cuda() ? on_host(self) : self;
  to.copy_(source.is_cuda() ? on_host(source) : source);
  return self;
}

// ---- everything else -----------------------------------------------------------------------------------------------

// One call of torch's on the CPU, with the device's memory in place of its tensors.
class HostCall {
 public:
  IValue to_host(const IValue& value) {
    if (value.isTensor()) return host_of(value.toTensor());
    if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(c10::kCPU);
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& item : value.toTensorVector()) list.push_back(host_of(item));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& item : value.toOptionalTensorVector()) {
        list.push_back(item ? std::optional(host_of(*item)) : item);
      }
      return list;
    }
    return value;
  }

  IValue to_device(const IValue& value) const {
    if (value.isTensor()) return device_of(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& item : value.toTensorVector()) list.push_back(device_of(item));
      return list;
    }
    return value;
  }

 private:
  Tensor host_of(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return tensor;
    pairs_.emplace_back(tensor, on_host(tensor));
    return pairs_.back().second;
  }

  Tensor device_of(const Tensor& result) const {
    if (!result.defined() || !result.is_cpu()) return result;
    for (const auto& [device, host] : pairs_) {
      if (result.unsafeGetTensorImpl() == host.unsafeGetTensorImpl()) return resized(device, host);
    }
    for (const auto& [device, host] : pairs_) {
      if (result.storage().unsafeGetStorageImpl() == host.storage().unsafeGetStorageImpl()) {
        return seen_through(result, device.storage(), c10::DispatchKey::CUDA);
      }
    }
    Tensor fresh =
        empty_strided(result.sizes(), result.strides(), result.scalar_type(), {}, {}, {});
    copy_into(fresh, result, false);
    return fresh;
  }

  // An `out` argument may have grown.
  static Tensor resized(const Tensor& device, const Tensor& host) {
    if (device.sizes() != host.sizes()) device.resize_(host.sizes());
    Tensor same = device;
    if (host.numel() > 0 && host.const_data_ptr() != same.const_data_ptr()) {
      copy_into(same, host, false);
    }
    return same;
  }

  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

void run_on_host(const c10::OperatorHandle& op, Stack* stack) {
  const std::string& name = op.schema().name();
  // Ours must have a CUDA version: its CPU version would prove nothing.
  TORCH_CHECK_NOT_IMPLEMENTED(name.starts_with("aten::"), name, " has no kernel for CUDA");
  const at::AutoDispatchBelowADInplaceOrView below;
  HostCall call;
  const auto count = op.schema().arguments().size();
  for (auto at = stack->size() - count; at < stack->size(); ++at) {
    (*stack)[at] = call.to_host((*stack)[at]);
  }
  op.callBoxed(stack);
  const auto returned = op.schema().returns().size();
  for (auto at = stack->size() - returned; at < stack->size(); ++at) {
    (*stack)[at] = call.to_device((*stack)[at]);
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_into);
  m.impl("resize_", &at::native::resize_);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(
    std::int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// What tensors hold now, and the most they have held since the last call.
extern "C" __attribute__((visibility("default"))) void emulated_bytes(std::size_t* now,
                                                                      std::size_t* peak) {
  const std::scoped_lock lock(held().mutex);
  *now = held().now;
  *peak = std::exchange(held().peak, held().now);
}
