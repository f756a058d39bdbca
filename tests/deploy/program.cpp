// A C++ program on the engine's public header alone: launches box_iou for the dtypes that it is given and prints the
// engine's statistics. On the fake driver (fake_libcuda.cpp) it needs no GPU.
// SPDX-License-Identifier: Apache-2.0
#include <cstdlib>
#include <iostream>
#include <string>

#include "detection/box_iou.h"
#include "torchkiln/torchkiln.hpp"

namespace {

using torchkiln::box_iou::Args;

struct Statics {
  std::int64_t scalar, mode, vector;
};
struct Sizes {
  std::int64_t n, m;
};
struct Tunables {
  std::int64_t block_size;
};
using Forward = torchkiln::Kernel<Args, Statics, Sizes, Tunables>;

// As the operator declares it.
const Forward forward({
    .path = "detection/box_iou.cuh",
    .entry = "forward",
    .operators = {"box_iou"},
    .statics = {torchkiln::types("scalar", torchkiln::kFloatTypes),
                torchkiln::ints("mode", {0, 1, 2, 3, 4, 5, 6}),
                torchkiln::ints("vector", {1, 2, 4})},
    .sizes = {{"n", TORCHKILN_BUCKET_NONE}, {"m", TORCHKILN_BUCKET_POW2}},
    .tunables = {torchkiln::ints("block_size", {64, 128, 256, 512})},
    .defaults = {{256}, {64}},
    .valid =
        [](const Statics& s) {
          return s.vector == 1 || s.vector == (s.scalar == TORCHKILN_DOUBLE ? 2 : 4);
        },
    .choose = [](const Forward::Problem& p) { return p.sizes.m <= 64 ? 1u : 0u; },
    .geometry =
        [](const Forward::Problem& p, const Tunables& t) {
          return torchkiln::linear(torchkiln::ceil_div(p.sizes.m, t.block_size), t.block_size);
        },
});

// Memory for the tuner's copies; that of the fake GPU is the host's.
void* allocate(void*, std::uint64_t bytes, void** owner) { return *owner = std::malloc(bytes); }
void release(void*, void* owner) { std::free(owner); }
constexpr torchkiln_allocator kAllocator{&allocate, &release, nullptr};

std::int64_t type_of(const std::string& dtype) {
  if (dtype == "float16") return TORCHKILN_HALF;
  return dtype == "float64" ? TORCHKILN_DOUBLE : TORCHKILN_FLOAT;
}

}  // namespace

int main(int count, char** arguments) try {
  for (int i = 1; i < count; ++i) {
    const Args args{};
    forward.run({.allocator = &kAllocator}, {type_of(arguments[i]), 0, 1}, {8, 100}, args, {});
  }
  char* reply = nullptr;
  torchkiln::check(torchkiln_control("statistics", "{}", &reply));
  std::cout << reply << "\n";
  torchkiln_free(reply);
  return 0;
} catch (const torchkiln::Error& error) {
  std::cout << torchkiln_last_error()->details << "\n";
  std::cerr << error.what() << "\n";
  return 1;
}
