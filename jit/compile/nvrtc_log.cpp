// The forms are those of NVRTC 12.6 to 13.5. What is not understood is skipped: a log is for people.
// SPDX-License-Identifier: Apache-2.0
#include "jit/compile/nvrtc_log.h"

#include <algorithm>
#include <charconv>

namespace torchkiln::jit {
namespace {

std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    lines.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

// The number in front of `unit`: 660 in "344 bytes stack frame, 660 bytes spill stores".
int number_before(std::string_view line, std::string_view unit) {
  const std::size_t end = line.find(unit);
  if (end == std::string_view::npos) return 0;
  std::size_t begin = end;
  while (begin > 0 && line[begin - 1] >= '0' && line[begin - 1] <= '9') --begin;
  int value = 0;
  std::from_chars(line.data() + begin, line.data() + end, value);
  return value;
}

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// "detection/box_iou.cuh(41): error: identifier ..." and its relatives ("catastrophic error",
// "error #20-D").
std::optional<FirstError> error_with_place(std::string_view line) {
  const std::size_t close = line.find("): ");
  if (close == std::string_view::npos) return std::nullopt;
  const std::size_t open = line.rfind('(', close);
  if (open == std::string_view::npos || open == 0) return std::nullopt;
  FirstError error;
  const char* end = line.data() + close;
  const auto [rest, code] = std::from_chars(line.data() + open + 1, end, error.line);
  if (code != std::errc() || rest != end) return std::nullopt;
  const std::string_view message = line.substr(close + 3);
  const std::size_t colon = message.find(": ");
  if (colon == std::string_view::npos || !contains(message.substr(0, colon), "error")) {
    return std::nullopt;
  }
  error.file = line.substr(0, open);
  error.text = message.substr(colon + 2);
  return error;
}

}  // namespace

Resources parse_resources(std::string_view log) {
  Resources resources;
  for (const std::string_view line : lines_of(log)) {
    if (contains(line, " bytes stack frame")) {
      resources.stack_bytes =
          std::max(resources.stack_bytes, number_before(line, " bytes stack frame"));
      resources.spill_bytes +=
          number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
    } else if (contains(line, "ptxas info") && contains(line, ": Used ")) {
      resources.known = true;
      resources.registers = std::max(resources.registers, number_before(line, " registers"));
      resources.shared_bytes = std::max(resources.shared_bytes, number_before(line, " bytes smem"));
      resources.stack_bytes =
          std::max(resources.stack_bytes, number_before(line, " bytes cumulative stack size"));
    }
  }
  return resources;
}

std::vector<std::string> parse_warnings(std::string_view log) {
  std::vector<std::string> warnings;
  for (const std::string_view line : lines_of(log)) {
    const bool front_end = contains(line, "): warning");
    const bool ptxas = line.starts_with("ptxas") && contains(line, "warning");
    if (front_end || ptxas) warnings.emplace_back(line);
  }
  return warnings;
}

FirstError parse_first_error(std::string_view log) {
  std::string_view fallback;
  for (const std::string_view line : lines_of(log)) {
    if (const auto error = error_with_place(line)) return *error;
    if (fallback.empty() && contains(line, "error")) fallback = line;
  }
  return {"", 0, std::string(fallback)};
}

std::string excerpt(std::string_view text, int line) {
  constexpr int kAround = 3;
  const std::vector<std::string_view> lines = lines_of(text);
  const int count = static_cast<int>(lines.size());
  if (line < 1 || line > count) return "";
  std::string result;
  for (int at = std::max(1, line - kAround); at <= std::min(count, line + kAround); ++at) {
    const std::string number = std::to_string(at);
    result += at == line ? "> " : "  ";
    result += std::string(number.size() < 4 ? 4 - number.size() : 0, ' ') + number + " | ";
    result += std::string(lines[static_cast<std::size_t>(at - 1)]) + "\n";
  }
  return result;
}

}  // namespace torchkiln::jit
