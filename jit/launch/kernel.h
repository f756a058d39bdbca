// A declared kernel: the declaration, and the specialisations that follow from it.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "jit/launch/record.h"
#include "jit/spec/specialization.h"
#include "torchkiln/torchkiln.h"

// The type behind the C interface's handle.
struct torchkiln_kernel {
  explicit torchkiln_kernel(const torchkiln_declaration& declaration);  // throws Error(INTERNAL)

  torchkiln_declaration declaration;
  std::uint32_t n_statics = 0;
  std::uint32_t n_tunables = 0;
  bool is_user = false;  // declared from a file that a user added
  torchkiln::jit::RecordTable records;
};

namespace torchkiln::jit {

using Kernel = ::torchkiln_kernel;

// Power of two that a size falls under; 0 where it does not count.
std::uint8_t bucket_of(const torchkiln_size& size, std::int64_t value);

LaunchKey launch_key(const Kernel& kernel, const torchkiln_launch& launch);

// The kernel that is declared as this; null when there is none.
const Kernel* find_kernel(std::span<Kernel* const> kernels, const std::string& path,
                          const std::string& entry);

bool is_legal(const Kernel& kernel, const torchkiln_problem& problem,
              std::span<const std::int64_t> tunables);

std::span<const std::int64_t> tunables_of_row(const Kernel& kernel, std::uint32_t row);

// Which row of defaults is for this problem; throws Error(INTERNAL) when the device can run none.
std::uint32_t default_row(const Kernel& kernel, const torchkiln_problem& problem);
std::span<const std::int64_t> choose_tunables(const Kernel& kernel,
                                              const torchkiln_problem& problem);

// Values of all parameters.
struct Variant {
  std::vector<std::int64_t> statics, tunables;
};

// Other programs that give the same answer for this problem: other defaults, and those with 0 for layer constants. Best
// first; `chosen` itself is not among them.
std::vector<Variant> substitutes(const Kernel& kernel, const torchkiln_problem& problem,
                                 std::span<const std::int64_t> chosen);

Specialization specialize(const Kernel& kernel, std::span<const std::int64_t> statics,
                          std::span<const std::int64_t> tunables);

// Every point of the search space that is legal for a problem, in the order of the declared values.
std::vector<std::vector<std::int64_t>> legal_points(const Kernel& kernel,
                                                    const torchkiln_problem& problem);

// Whether at least one of the devices can run a point of the search space on a problem of some usual size.
bool runs_somewhere(const Kernel& kernel, std::span<const std::int64_t> statics,
                    std::span<const std::int64_t> point, std::span<const torchkiln_device> devices);

// Which points of the search space: those that the default can return, every combination of the smallest and largest
// value of each tunable, or all.
enum class Points { kDefaults, kCorners, kAll };

// Every generic variant for these dtypes (all when empty), with every such point that at least one of the devices can run
// on a problem of some usual size; any GPU that we know when `devices` is empty.
std::vector<Specialization> expand(const Kernel& kernel, std::span<const std::int64_t> dtypes,
                                   Points points = Points::kDefaults,
                                   std::span<const torchkiln_device> devices = {});

// How many points of the search space at least one of the devices can run, for some static values and usual sizes.
std::size_t count_legal(const Kernel& kernel, std::span<const torchkiln_device> devices);

bool launches_for(const Kernel& kernel, const std::string& operator_name);

}  // namespace torchkiln::jit
