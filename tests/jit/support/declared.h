// What every test's declaration has in common.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "torchkiln/torchkiln.h"

namespace torchkiln::jit::testing {

// A declaration of arrays that live as long as it; `defaults` are rows, one value for each tunable among `params`. The
// geometry launches nothing until a test says otherwise.
template <std::size_t kOperators, std::size_t kParams, std::size_t kSizes, std::size_t kDefaults>
torchkiln_declaration declare(const char* path, const char* entry,
                              const char* const (&operators)[kOperators],
                              const torchkiln_param (&params)[kParams],
                              const torchkiln_size (&sizes)[kSizes],
                              const std::int64_t (&defaults)[kDefaults]) {
  std::uint32_t tunables = 0;
  for (const torchkiln_param& param : params) tunables += param.tunable != 0;
  torchkiln_declaration d{};
  d.struct_size = sizeof(d);
  d.path = path;
  d.entry = entry;
  d.operators = operators;
  d.n_operators = kOperators;
  d.params = params;
  d.n_params = kParams;
  d.sizes = sizes;
  d.n_sizes = kSizes;
  d.defaults = defaults;
  d.n_defaults = kDefaults / tunables;
  d.geometry = [](const torchkiln_problem*, const std::int64_t*, torchkiln_geometry*) {};
  return d;
}

}  // namespace torchkiln::jit::testing
