// Objects loaded into the driver, made resident in a device's context at once: left to itself CUDA loads a kernel at its
// first launch, under the context lock, which can dead-lock beside a kernel that waits for another one.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "jit/launch/driver.h"
#include "jit/launch/record.h"
#include "jit/objects.h"

namespace torchkiln::jit {

// Thread-safe. Nothing is unloaded before the process ends: unloading kills a graph capture, and records point here.
class Residents {
 public:
  Residents(Driver& driver, Objects& objects, Statistics& statistics)
      : driver_(driver), objects_(objects), statistics_(statistics) {}

  // Walks the ladder for the device: exact machine code, machine code of the same major, PTX. Throws when no rung holds.
  CudaFunction function(const Specialization& specialization, int device);
  // The object that it would load; compiles like `function`, needs no context.
  Found object(const Specialization& specialization, int device, Priority priority);
  // The same as `function` without compiling; nothing when no layer has code that the device and the driver take.
  std::optional<CudaFunction> find(const Specialization& specialization, int device);
  LaunchLimits limits(CudaFunction function, int device);

 private:
  struct Loaded {
    CudaLibrary library = nullptr;
    CudaKernel kernel = nullptr;
  };

  std::optional<Found> find_relative(const Specialization& specialization, int device);
  Loaded load(const Found& found, const std::string& text);
  Loaded hand_to_driver(const Found& found, const std::string& text);
  CudaFunction make_resident(const Loaded& loaded, const std::string& text, int device);
  int attribute(CudaFunction function, CudaFunctionAttribute which, const std::string& text);

  Driver& driver_;
  Objects& objects_;
  Statistics& statistics_;
  std::mutex mutex_;
  std::unordered_map<std::string, Loaded>
      loaded_;  // by cache key: one library serves every device it fits
};

}  // namespace torchkiln::jit
