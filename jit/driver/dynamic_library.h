// Libraries opened at run time, and what this process has mapped already.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace torchkiln::jit {

// A handle that never closes its library: libcuda and libnvrtc keep threads and exit handlers of
// their own, and unmapping code under them crashes. So copies are cheap and always valid.
class DynamicLibrary {
 public:
  // Nothing, and the loader's sentence in `why`, when `name` cannot be loaded. A name without a
  // slash is searched by the system's loader.
  static std::optional<DynamicLibrary> open(const std::string& name, std::string& why);

  void* symbol(const char* name) const;  // null when absent
  std::string path() const;              // of the file, links resolved; "" when the loader hides it

 private:
  explicit DynamicLibrary(void* handle) : handle_(handle) {}

  void* handle_;
};

// Paths of all libraries in this process, in load order.
std::vector<std::string> mapped_libraries();

}  // namespace torchkiln::jit
