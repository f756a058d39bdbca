// Opening the driver, device facts, contexts.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/launch/driver.h"

namespace torchkiln::jit {

const CudaApi& Driver::api() {
  if (const CudaApi* ready = api_.load(std::memory_order_acquire)) return *ready;
  const std::scoped_lock lock(mutex_);
  if (failure_) throw Error(*failure_);
  if (!owned_) {
    try {
      auto opened = std::make_unique<CudaApi>(open_());
      initialize(*opened);
      owned_ = std::move(opened);
    } catch (const Error& e) {
      failure_ = e;
      throw;
    }
    api_.store(owned_.get(), std::memory_order_release);
  }
  return *owned_;
}

const torchkiln_device& Driver::device(int ordinal) {
  const auto index = static_cast<std::size_t>(ordinal);
  if (index >= kMaxDevices) {
    throw Error(TORCHKILN_ERROR_DRIVER,
                "device must be between 0 and 63; got " + std::to_string(ordinal));
  }
  if (const auto* known = devices_[index].load(std::memory_order_acquire)) return *known;
  const CudaApi& cuda = api();
  auto facts = std::make_unique<const torchkiln_device>(query_device(cuda, ordinal));
  const std::scoped_lock lock(mutex_);
  if (const auto* known = devices_[index].load(std::memory_order_acquire)) return *known;
  // Lives as long as the process: launch records point to it.
  const torchkiln_device* published = facts.release();
  devices_[index].store(published, std::memory_order_release);
  return *published;
}

int Driver::version() { return driver_version(api()); }

// Retained for good: torch holds the primary context anyway, and releasing it from a dying thread helps nobody.
CudaContext Driver::primary(int ordinal) {
  device(ordinal);  // checks the ordinal
  auto& known = primaries_[static_cast<std::size_t>(ordinal)];
  if (CudaContext context = known.load(std::memory_order_acquire)) return context;
  const CudaApi& cuda = api();
  const std::string what = "device " + std::to_string(ordinal);
  CudaDevice device{};
  CudaContext context = nullptr;
  check(cuda, cuda.cuDeviceGet(&device, ordinal), "cuDeviceGet", what);
  check(cuda, cuda.cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain", what);
  known.store(context, std::memory_order_release);
  return context;
}

void Driver::attach(int ordinal) {
  const CudaApi& cuda = api();
  CudaContext current = nullptr;
  check(cuda, cuda.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  if (current != nullptr) return;
  check(cuda, cuda.cuCtxSetCurrent(primary(ordinal)), "cuCtxSetCurrent");
}

CudaContext Driver::enter(int ordinal) {
  const CudaApi& cuda = api();
  CudaContext current = nullptr;
  check(cuda, cuda.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  CudaContext wanted = primary(ordinal);
  if (current == wanted) return nullptr;
  check(cuda, cuda.cuCtxSetCurrent(wanted), "cuCtxSetCurrent");
  return current;
}

void Driver::leave(CudaContext before) {
  // A thread that had none keeps ours, as after attach.
  if (before != nullptr) api().cuCtxSetCurrent(before);
}

bool Driver::is_capturing(void* stream) {
  CudaCaptureStatus status = kCaptureNone;
  check(api(), api().cuStreamIsCapturing(static_cast<CudaStream>(stream), &status),
        "cuStreamIsCapturing", "asking whether a stream is captured");
  return status != kCaptureNone;
}

}  // namespace torchkiln::jit
