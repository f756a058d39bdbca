// One entry of the library's procedure linkage table.
// SPDX-License-Identifier: Apache-2.0
#include "jit/driver/exit_handlers.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <system_error>

namespace torchkiln::jit {
namespace {

#if defined(__aarch64__)
constexpr auto kJumpSlot = R_AARCH64_JUMP_SLOT;
#else
constexpr auto kJumpSlot = R_X86_64_JUMP_SLOT;
#endif

std::atomic<void (*)()> after_registration = nullptr;

int register_and_tell(void (*handler)(void*), void* argument, void* library) {
  const int result = abi::__cxa_atexit(handler, argument, library);
  if (void (*const tell)() = after_registration.load()) tell();
  return result;
}

// The dynamic section after loading: the loader has turned its offsets into addresses.
struct Dynamic {
  explicit Dynamic(const link_map& library) {
    for (const ElfW(Dyn)* entry = library.l_ld; entry->d_tag != DT_NULL; ++entry) {
      switch (entry->d_tag) {
        case DT_JMPREL:
          slots = reinterpret_cast<const ElfW(Rela)*>(entry->d_un.d_ptr);
          break;
        case DT_PLTRELSZ:
          count = entry->d_un.d_val / sizeof(ElfW(Rela));
          break;
        case DT_SYMTAB:
          symbols = reinterpret_cast<const ElfW(Sym)*>(entry->d_un.d_ptr);
          break;
        case DT_STRTAB:
          names = reinterpret_cast<const char*>(entry->d_un.d_ptr);
          break;
        default:
          break;
      }
    }
  }
  const ElfW(Rela) * slots = nullptr;
  std::size_t count = 0;
  const ElfW(Sym) * symbols = nullptr;
  const char* names = nullptr;
};

void** find_slot(const link_map& library, const char* name) {
  const Dynamic dynamic(library);
  if (dynamic.slots == nullptr || dynamic.symbols == nullptr || dynamic.names == nullptr)
    return nullptr;
  for (std::size_t i = 0; i < dynamic.count; ++i) {
    const ElfW(Rela) & slot = dynamic.slots[i];
    const ElfW(Sym) & symbol = dynamic.symbols[ELF64_R_SYM(slot.r_info)];
    if (ELF64_R_TYPE(slot.r_info) == kJumpSlot &&
        std::strcmp(dynamic.names + symbol.st_name, name) == 0) {
      return reinterpret_cast<void**>(library.l_addr + slot.r_offset);
    }
  }
  return nullptr;
}

struct Place {
  std::uintptr_t library;
  std::uintptr_t slot;
};

// Whether the loader has made the slot read-only.
bool is_protected(Place place) {
  const auto look = [](dl_phdr_info* info, std::size_t, void* data) {
    const Place& wanted = *static_cast<const Place*>(data);
    if (info->dlpi_addr != wanted.library) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      const std::uintptr_t start = info->dlpi_addr + segment.p_vaddr;
      if (segment.p_type == PT_GNU_RELRO && wanted.slot >= start &&
          wanted.slot < start + segment.p_memsz) {
        return 1;
      }
    }
    return 0;
  };
  return ::dl_iterate_phdr(look, &place) != 0;
}

// Leaves the page as it was.
bool write_slot(const link_map& library, void** slot, void* value) {
  const Place place = {library.l_addr, reinterpret_cast<std::uintptr_t>(slot)};
  const auto page_bytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  void* page = reinterpret_cast<void*>(place.slot & ~(page_bytes - 1));
  const bool is_read_only = is_protected(place);
  if (is_read_only && ::mprotect(page, page_bytes, PROT_READ | PROT_WRITE) != 0) return false;
  std::atomic_ref<void*>(*slot).store(value);
  if (is_read_only) ::mprotect(page, page_bytes, PROT_READ);
  return true;
}

}  // namespace

bool watch_exit_handlers(const std::string& path, const void* function, void (*registered)()) {
  Dl_info info{};
  void* map = nullptr;
  if (::dladdr1(function, &info, &map, RTLD_DL_LINKMAP) == 0 || map == nullptr) return false;
  const auto& library = *static_cast<const link_map*>(map);
  std::error_code error;
  if (std::filesystem::canonical(library.l_name, error) != path || error) return false;
  void** slot = find_slot(library, "__cxa_atexit");
  if (slot == nullptr) return false;
  // Two threads may open a compiler at once: one would close the page that the other is about to write.
  static std::mutex writing;
  const std::scoped_lock lock(writing);
  after_registration = registered;
  void* ours = reinterpret_cast<void*>(&register_and_tell);
  return *slot == ours || write_slot(library, slot, ours);
}

}  // namespace torchkiln::jit
