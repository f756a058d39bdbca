// Votes, shuffles, matches and reductions, as the CUDA C++ programming guide defines them.
// SPDX-License-Identifier: Apache-2.0
#include "tests/emulated/emulator/warp.h"

#include <algorithm>
#include <bit>
#include <cstdio>

namespace torchkiln::emulator {

using namespace torchkiln_emulator;

namespace {

WarpAnswer shuffle(const WarpRequest* requests, unsigned arrived, int lane) {
  const WarpRequest& own = requests[lane];
  const int begin = lane & ~(own.width - 1), last = begin + own.width - 1;
  int from = lane;
  switch (own.call) {
    case kShuffle:
      from = begin + (own.operand & (own.width - 1));
      break;
    case kShuffleUp:
      if (lane - own.operand >= begin) from = lane - own.operand;
      break;
    case kShuffleDown:
      if (lane + own.operand <= last) from = lane + own.operand;
      break;
    default:
      if ((lane ^ own.operand) <= last) from = lane ^ own.operand;
  }
  if ((arrived >> from & 1) == 0) return {.missing_lane = from};
  return {.value = requests[from].value};
}

template <class F>
unsigned long long reduced(const WarpRequest* requests, unsigned arrived, const F& join) {
  bool first = true;
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((arrived >> lane & 1) == 0) continue;
    const auto value = static_cast<unsigned>(requests[lane].value);
    result = first ? value : join(result, value);
    first = false;
  }
  return result;
}

unsigned lanes_with(const WarpRequest* requests, unsigned arrived, unsigned long long value) {
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((arrived >> lane & 1) != 0 && requests[lane].value == value) result |= 1u << lane;
  }
  return result;
}

int as_signed(unsigned x) { return std::bit_cast<int>(x); }

}  // namespace

WarpAnswer answer_of(const WarpRequest* requests, unsigned arrived, unsigned lane) {
  const WarpRequest& own = requests[lane];
  const unsigned yes = lanes_with(requests, arrived, 1);
  const unsigned same = lanes_with(requests, arrived, own.value);
  switch (own.call) {
    case kSyncWarp:
      return {};
    case kBallot:
      return {.value = yes};
    case kAll:
      return {.value = yes == arrived ? 1u : 0u};
    case kAny:
      return {.value = yes != 0 ? 1u : 0u};
    case kMatchAny:
      return {.value = same};
    case kMatchAll:
      return {.value = same == arrived ? arrived : 0u};
    case kReduceAdd:
      return {.value = reduced(requests, arrived, [](unsigned a, unsigned b) { return a + b; })};
    case kReduceMin:
      return {.value = reduced(requests, arrived,
                               [](unsigned a, unsigned b) { return std::min(a, b); })};
    case kReduceMinSigned:
      return {.value = reduced(requests, arrived, [](unsigned a, unsigned b) {
                return as_signed(a) < as_signed(b) ? a : b;
              })};
    case kReduceMax:
      return {.value = reduced(requests, arrived,
                               [](unsigned a, unsigned b) { return std::max(a, b); })};
    case kReduceMaxSigned:
      return {.value = reduced(requests, arrived, [](unsigned a, unsigned b) {
                return as_signed(a) < as_signed(b) ? b : a;
              })};
    case kReduceAnd:
      return {.value = reduced(requests, arrived, [](unsigned a, unsigned b) { return a & b; })};
    case kReduceOr:
      return {.value = reduced(requests, arrived, [](unsigned a, unsigned b) { return a | b; })};
    case kReduceXor:
      return {.value = reduced(requests, arrived, [](unsigned a, unsigned b) { return a ^ b; })};
    default:
      return shuffle(requests, arrived, static_cast<int>(lane));
  }
}

const char* name_of(WarpCall call) {
  constexpr const char* kNames[] = {
      "__syncwarp",        "__ballot_sync",     "__all_sync",        "__any_sync",
      "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",  "__shfl_xor_sync",
      "__match_any_sync",  "__match_all_sync",  "__reduce_add_sync", "__reduce_min_sync",
      "__reduce_min_sync", "__reduce_max_sync", "__reduce_max_sync", "__reduce_and_sync",
      "__reduce_or_sync",  "__reduce_xor_sync",
  };
  return kNames[call];
}

const char* name_of(BlockCall call) {
  constexpr const char* kNames[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and",
                                    "__syncthreads_or"};
  return kNames[call];
}

std::string hex(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof(digits), "0x%08x", mask);
  return digits;
}

}  // namespace torchkiln::emulator
