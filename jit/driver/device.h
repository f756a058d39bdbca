// Facts of a device, asked once from the driver.
// SPDX-License-Identifier: Apache-2.0
#pragma once

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

}  // namespace torchkiln::jit
