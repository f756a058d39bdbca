// The ladder, loading, residency.
//
// SPDX-License-Identifier: Apache-2.0
#include "jit/launch/resident.h"

#include <chrono>

#include "jit/compile/ladder.h"
#include "jit/log.h"

namespace torchkiln::jit {
namespace {

Target exact_target(const Specialization& specialization, const torchkiln_device& device) {
  return {.architecture = device.major * 10 + device.minor,
          .specific = specialization.architecture_specific};
}

}  // namespace

CudaFunction Residents::function(const Specialization& specialization, int device) {
  driver_.attach(device);
  const std::string text = specialization.text();
  Found found = object(specialization, device, Priority::kInteractive);
  try {
    return make_resident(load(found, text), text, device);
  } catch (const Error& e) {
    if (found.layer == Layer::kCompiled) throw;
    // Bytes from a cache that this driver refuses are a miss, once.
    objects_.refuse(found, e.what());
  }
  found = object(specialization, device, Priority::kInteractive);
  return make_resident(load(found, text), text, device);
}

std::optional<CudaFunction> Residents::find(const Specialization& specialization, int device) {
  driver_.attach(device);
  const std::string text = specialization.text();
  // One that the driver refuses is not found again; each layer may hold one.
  constexpr int kLayers = 3;
  for (int attempt = 0; attempt < kLayers; ++attempt) {
    auto found =
        objects_.find(specialization, exact_target(specialization, driver_.device(device)));
    if (!found) found = find_relative(specialization, device);
    if (!found) return std::nullopt;
    try {
      return make_resident(load(*found, text), text, device);
    } catch (const Error& e) {
      objects_.refuse(*found, e.what());
    }
  }
  return std::nullopt;
}

// Relatives that run on the device, for where nothing can be compiled.
std::optional<Found> Residents::find_relative(const Specialization& specialization, int ordinal) {
  const Ladder tried = ladder(driver_.device(ordinal), specialization.architecture_specific,
                              specialization.min_architecture, {}, 0, driver_.version());
  for (const Rung& rung : tried.loadable) {
    if (auto found = objects_.find(specialization, rung.target)) return found;
  }
  return std::nullopt;
}

Found Residents::object(const Specialization& specialization, int ordinal, Priority priority) {
  const torchkiln_device& device = driver_.device(ordinal);
  // The usual case needs no compiler, not even its list of architectures.
  if (auto found = objects_.find(specialization, exact_target(specialization, device)))
    return *found;
  std::shared_ptr<const Compiler> compiler;
  try {
    compiler = objects_.compiler();
  } catch (const Error&) {
    // A relative's machine code does as well, but only where there is no compiler to do better.
    if (auto found = find_relative(specialization, ordinal)) return *found;
    throw;
  }
  const Ladder tried =
      ladder(device, specialization.architecture_specific, specialization.min_architecture,
             compiler->architectures(), compiler->version(), driver_.version());
  for (const Rung& rung : tried.rungs) {
    if (auto found = objects_.find(specialization, rung.target)) return *found;
  }
  if (tried.rungs.empty()) {
    throw Error(TORCHKILN_ERROR_COMPILER, specialization.text() + ": " + tried.explanation);
  }
  const Rung& first = tried.rungs.front();
  if (first.target != exact_target(specialization, device)) {
    warn(specialization.text() + " runs as " + first.target.text() + ": " + first.reason);
  }
  return objects_.get(specialization, first.target, priority);
}

Residents::Loaded Residents::load(const Found& found, const std::string& text) {
  {
    const std::scoped_lock lock(mutex_);
    if (const auto known = loaded_.find(found.key); known != loaded_.end()) return known->second;
  }
  const auto start = std::chrono::steady_clock::now();
  const Loaded loaded = hand_to_driver(found, text);
  const auto elapsed = std::chrono::steady_clock::now() - start;
  Statistics::add(statistics_.loads);
  Statistics::add(statistics_.load_microseconds,
                  static_cast<std::uint64_t>(
                      std::chrono::duration_cast<std::chrono::microseconds>(elapsed).count()));
  const std::scoped_lock lock(mutex_);
  return loaded_.try_emplace(found.key, loaded).first->second;
}

Residents::Loaded Residents::hand_to_driver(const Found& found, const std::string& text) {
  const CudaApi& cuda = driver_.api();
  Loaded loaded;
  check(cuda,
        cuda.cuLibraryLoadData(&loaded.library, found.object->payload.data(), nullptr, nullptr, 0,
                               nullptr, nullptr, 0),
        "cuLibraryLoadData", text);
  const auto name = found.object->header.at("lowered_name").get<std::string>();
  check(cuda, cuda.cuLibraryGetKernel(&loaded.kernel, loaded.library, name.c_str()),
        "cuLibraryGetKernel", text);
  return loaded;
}

CudaFunction Residents::make_resident(const Loaded& loaded, const std::string& text, int ordinal) {
  const CudaApi& cuda = driver_.api();
  CudaFunction function = nullptr;
  check(cuda, cuda.cuKernelGetFunction(&function, loaded.kernel), "cuKernelGetFunction", text);
  if (cuda.cuFuncLoad != nullptr) check(cuda, cuda.cuFuncLoad(function), "cuFuncLoad", text);
  const int dynamic_limit = driver_.device(ordinal).shared_bytes_per_block -
                            attribute(function, kFunctionSharedBytes, text);
  // Raises only a limit; what a launch asks for decides what it gets.
  check(cuda, cuda.cuFuncSetAttribute(function, kFunctionMaxDynamicSharedBytes, dynamic_limit),
        "cuFuncSetAttribute", text);
  return function;
}

int Residents::attribute(CudaFunction function, CudaFunctionAttribute which,
                         const std::string& text) {
  int value = 0;
  check(driver_.api(), driver_.api().cuFuncGetAttribute(&value, which, function),
        "cuFuncGetAttribute", text);
  return value;
}

LaunchLimits Residents::limits(CudaFunction function, int device) {
  const std::string text = "limits of a kernel";
  return {
      .threads = static_cast<std::uint32_t>(attribute(function, kFunctionMaxThreadsPerBlock, text)),
      .dynamic_shared_bytes =
          static_cast<std::uint32_t>(driver_.device(device).shared_bytes_per_block -
                                     attribute(function, kFunctionSharedBytes, text))};
}

}  // namespace torchkiln::jit
