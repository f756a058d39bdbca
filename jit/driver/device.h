// Facts of a device, asked once from the driver.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "jit/driver/cuda_api.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

// Need an initialised driver; throw Error(VALUE) for an ordinal that does not exist and
// Error(DRIVER) when the driver refuses.
torchkiln_device query_device(const CudaApi& cuda, int ordinal);
std::string device_name(const CudaApi& cuda, int ordinal);  // "NVIDIA H200"
int device_count(const CudaApi& cuda);
// "default", "prohibited" or "exclusive process": who may use the GPU, as nvidia-smi -c sets it.
std::string compute_mode(const CudaApi& cuda, int ordinal);

// Facts of a usual GPU of this architecture (90 for sm_90), from public data sheets: for choices about a device that is
// not there. An architecture that is not in the table gets the numbers of the next older one that is.
torchkiln_device typical_device(int architecture);
// One for each row of the table.
std::vector<torchkiln_device> typical_devices();

// What a measured time depends on: two devices with the same identity share tuning records.
struct DeviceIdentity {
  std::string name;      // NVIDIA H200; that of a MIG slice names the slice
  int architecture = 0;  // 90
  int multiprocessors = 0;
  std::int64_t l2_bytes = 0;
  int memory_bus_bits = 0, memory_kilohertz = 0;
  bool ecc = false;

  std::string id() const;  // nvidia-h200-3f0c12ab: a file name
  nlohmann::json to_json() const;
  static std::optional<DeviceIdentity> from_json(const nlohmann::json& json);
  bool operator==(const DeviceIdentity&) const = default;
};
DeviceIdentity query_identity(const CudaApi& cuda, int ordinal);

}  // namespace torchkiln::jit
