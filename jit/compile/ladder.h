// Which machine code a device may run, best first: code for it, code for a relative, PTX.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <vector>

#include "jit/spec/specialization.h"
#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

struct Rung {
  Target target;
  std::string reason;  // for people: "compiled for the device"
};

struct Ladder {
  std::vector<Rung> rungs;     // what this compiler can make and this device and driver can run
  std::vector<Rung> loadable;  // what the device can run if a cache or a bundle has it
  std::string explanation;     // every rung tried, and why it holds or not; a whole message
};

// Versions as the driver counts: 13050 for 13.5. Without a compiler `compiler_architectures` is
// empty and `nvrtc_version` 0: then only `loadable` has rungs.
Ladder ladder(const torchkiln_device& device, bool architecture_specific, int min_architecture,
              std::span<const int> compiler_architectures, int nvrtc_version, int driver_version);

// Machine code of sm_`code` runs on sm_`device`: same major, no higher minor, and not between an
// integrated chip and the others, where NVIDIA gives no such promise.
bool binary_compatible(int code, int device);

}  // namespace torchkiln::jit
