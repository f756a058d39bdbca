// Reads NVRTC's log: resources of the kernel, warnings, and the first error with its place.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace torchkiln::jit {

struct Resources {
  bool known = false;  // false for PTX: registers are given out by the driver
  int registers = 0;
  int shared_bytes = 0;  // static
  int stack_bytes = 0;
  int spill_bytes = 0;  // stores and loads, of the kernel and the functions it calls
};
Resources parse_resources(std::string_view log);

// One line each, without the quoted source.
std::vector<std::string> parse_warnings(std::string_view log);

struct FirstError {
  std::string file;  // "" when the log names none (options, ptxas)
  int line = 0;
  std::string text;
};
FirstError parse_first_error(std::string_view log);

// The lines around `line` with their numbers, the line itself marked.
std::string excerpt(std::string_view text, int line);

}  // namespace torchkiln::jit
