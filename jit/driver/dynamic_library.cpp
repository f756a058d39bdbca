// dlopen, dlsym, dlinfo and dl_iterate_phdr.
// SPDX-License-Identifier: Apache-2.0
#include "jit/driver/dynamic_library.h"

#include <dlfcn.h>
#include <link.h>

#include <filesystem>
#include <system_error>

namespace torchkiln::jit {

std::optional<DynamicLibrary> DynamicLibrary::open(const std::string& name, std::string& why) {
  void* handle = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle != nullptr) return DynamicLibrary(handle);
  const char* reason = ::dlerror();
  why = reason == nullptr ? "unknown reason" : reason;
  return std::nullopt;
}

void* DynamicLibrary::symbol(const char* name) const { return ::dlsym(handle_, name); }

std::string DynamicLibrary::path() const {
  link_map* map = nullptr;
  if (::dlinfo(handle_, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr) return "";
  std::error_code error;
  const auto path = std::filesystem::canonical(map->l_name, error);
  return error ? std::string(map->l_name) : path.string();
}

std::vector<std::string> mapped_libraries() {
  std::vector<std::string> paths;
  const auto collect = [](dl_phdr_info* info, std::size_t, void* data) {
    // The program itself has an empty name.
    if (info->dlpi_name != nullptr && info->dlpi_name[0] != '\0') {
      static_cast<std::vector<std::string>*>(data)->emplace_back(info->dlpi_name);
    }
    return 0;
  };
  ::dl_iterate_phdr(collect, &paths);
  return paths;
}

}  // namespace torchkiln::jit
