// The one exception type of the engine: what kind of failure, which argument, and data for whoever wants more.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>

#include "torchkiln/torchkiln.h"

namespace torchkiln::jit {

class Error : public std::runtime_error {
 public:
  Error(torchkiln_error_kind kind, const std::string& message,
        nlohmann::json details = nlohmann::json::object(), std::string argument = "")
      : std::runtime_error(message),
        kind_(kind),
        argument_(std::move(argument)),
        details_(std::move(details)) {}

  torchkiln_error_kind kind() const { return kind_; }
  const std::string& argument() const { return argument_; }
  const nlohmann::json& details() const { return details_; }

 private:
  torchkiln_error_kind kind_;
  std::string argument_;
  nlohmann::json details_;
};

}  // namespace torchkiln::jit
