// Runs a grid of a kernel that was compiled for the host: each thread is a fiber that runs until it waits.
//
// Nothing runs at the same time, so every schedule can be repeated. Threads change where they wait for others, where they
// sleep and, so that a loop around a volatile read ends, every few milliseconds. What a barrier that is missing lets happen
// depends on the schedule: try several.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <memory>
#include <string>
#include <string_view>

namespace torchkiln::emulator {

// Order of blocks, of warps and of the lanes of a warp: 0 rising, 1 falling, any other number its own random one.
void set_schedule(unsigned seed);

struct Shape {
  std::array<unsigned, 3> grid, block;
  unsigned dynamic_shared_bytes;
};

class Object;

// Loads what the emulated NVRTC made; throws std::runtime_error.
std::shared_ptr<Object> load(std::string_view file);

// `arguments` are packed. Throws std::runtime_error with a sentence about what the kernel did wrong.
void run(Object& object, const Shape& shape, const std::string& arguments);

}  // namespace torchkiln::emulator
