// Facts of a device, asked once from the driver.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "jit/driver/cuda_api.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

// Need an initialised driver; throw Error(VALUE) for an ordinal that does not exist and
// Error(DRIVER) when the driver refuses.
torchkiln_device query_device(const CudaApi& cuda, int ordinal);
std::string device_name(const CudaApi& cuda, int ordinal);  // "NVIDIA H200"
int device_count(const CudaApi& cuda);

}  // namespace torchkiln::jit
