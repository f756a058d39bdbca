// What the calls of a warp give to each lane.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

#include "tests/emulated/emulator/abi.h"

namespace torchkiln::emulator {

struct WarpRequest {
  torchkiln_emulator::WarpCall call = torchkiln_emulator::kSyncWarp;
  unsigned mask = 0;
  unsigned long long value = 0;
  int operand = 0, width = 32;
};

struct WarpAnswer {
  unsigned long long value = 0;
  int missing_lane = -1;  // that was asked for its value
};

// `requests` of the lanes in `arrived`, which are all of one call.
WarpAnswer answer_of(const WarpRequest* requests, unsigned arrived, unsigned lane);

const char* name_of(torchkiln_emulator::WarpCall call);
const char* name_of(torchkiln_emulator::BlockCall call);
std::string hex(unsigned mask);

}  // namespace torchkiln::emulator
