// Handing a kernel to the driver.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "jit/driver/cuda_api.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

// All parameters as one piece of memory, be it a struct or several. The driver copies them before it returns.
inline CudaResult submit_kernel(const CudaApi& cuda, CudaFunction function,
                                const torchkiln_geometry& g, void* stream, const void* args,
                                std::size_t args_size) {
  void* packed[] = {kLaunchParamBuffer, const_cast<void*>(args), kLaunchParamBufferSize, &args_size,
                    kLaunchParamEnd};
  return cuda.cuLaunchKernel(function, g.grid[0], g.grid[1], g.grid[2], g.block[0], g.block[1],
                             g.block[2], g.dynamic_shared_bytes, static_cast<CudaStream>(stream),
                             nullptr, packed);
}

}  // namespace torchkiln::jit
