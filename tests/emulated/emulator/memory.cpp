// Buffers between pages that may not be touched.
// SPDX-License-Identifier: Apache-2.0
#include "tests/emulated/emulator/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace torchkiln::emulator {
namespace {

constexpr std::size_t kAlignment = 16;
constexpr unsigned char kBeside = 0xa5;
// On either side of a buffer: what a wrong stride steps over must not be another buffer.
constexpr std::size_t kGuard = std::size_t{1} << 20;

struct Buffer {
  char* region;  // with the guards
  std::size_t region_bytes;
  char* data;
  std::size_t bytes;
  const char* what;
};

struct Memory {
  std::mutex mutex;
  std::map<const char*, Buffer> buffers;  // by region
  Guarded guarded = Guarded::kEnd;
};

Memory& memory() {
  static Memory& instance = *new Memory;
  return instance;
}

std::size_t page() {
  static const auto size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

std::size_t round_up(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

std::string sized(const Buffer& buffer) {
  return std::string(buffer.what) + " of " + std::to_string(buffer.bytes) + " bytes";
}

// The first byte of [begin, end) that was changed.
const char* changed(const char* begin, const char* end) {
  const char* found = std::find_if(
      begin, end, [](char byte) { return static_cast<unsigned char>(byte) != kBeside; });
  return found == end ? nullptr : found;
}

std::string describe(const Buffer& buffer, const char* at) {
  if (at < buffer.data) {
    return std::to_string(buffer.data - at) + " bytes before " + sized(buffer);
  }
  const auto offset = static_cast<std::size_t>(at - buffer.data);
  if (offset < buffer.bytes) return "byte " + std::to_string(offset) + " of " + sized(buffer);
  return std::to_string(offset - buffer.bytes) + " bytes behind the end of " + sized(buffer);
}

}  // namespace

void guard(Guarded end) {
  const std::scoped_lock lock(memory().mutex);
  memory().guarded = end;
}

void* allocate(std::size_t bytes, const char* what) {
  const std::size_t inner = round_up(std::max<std::size_t>(bytes, 1), page());
  const std::size_t all = inner + 2 * kGuard;
  void* mapped = ::mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* region = static_cast<char*>(mapped);
  char* first = region + kGuard;
  if (::mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) {
    ::munmap(region, all);
    throw std::bad_alloc();
  }
  const std::scoped_lock lock(memory().mutex);
  const bool at_end = memory().guarded == Guarded::kEnd;
  char* data = at_end ? first + inner - round_up(bytes, kAlignment) : first;
  std::memset(first, kBeside, inner);
  std::memset(data, kFresh, bytes);
  memory().buffers[region] = {region, all, data, bytes, what};
  return data;
}

void release(void* pointer) {
  const std::scoped_lock lock(memory().mutex);
  auto& buffers = memory().buffers;
  auto found = buffers.upper_bound(static_cast<char*>(pointer));
  if (found == buffers.begin()) return;
  --found;
  ::munmap(found->second.region, found->second.region_bytes);
  buffers.erase(found);
}

std::string describe(const void* address) {
  const std::scoped_lock lock(memory().mutex);
  const auto* at = static_cast<const char*>(address);
  const auto& buffers = memory().buffers;
  // The nearest one: a stride too far may jump over a guard page.
  const Buffer* nearest = nullptr;
  auto distance = static_cast<std::uintptr_t>(-1);
  for (const auto& [region, buffer] : buffers) {
    const char* end = buffer.data + buffer.bytes;
    const auto away = static_cast<std::uintptr_t>(at < buffer.data ? buffer.data - at
                                                  : at >= end      ? at - end
                                                                   : 0);
    if (away < distance) {
      distance = away;
      nearest = &buffer;
    }
  }
  constexpr std::uintptr_t kNear = std::uintptr_t{1} << 30;
  if (nearest == nullptr || distance > kNear) {
    return "an address that belongs to no buffer of the device";
  }
  return describe(*nearest, at);
}

std::optional<std::string> unseen_writes() {
  const std::scoped_lock lock(memory().mutex);
  for (const auto& [region, buffer] : memory().buffers) {
    const char* first = region + kGuard;
    const char* last = region + buffer.region_bytes - kGuard;
    const char* found = changed(first, buffer.data);
    if (found == nullptr) found = changed(buffer.data + buffer.bytes, last);
    if (found == nullptr) continue;
    std::string place = describe(buffer, found);
    // Told once.
    std::memset(const_cast<char*>(first), kBeside, static_cast<std::size_t>(buffer.data - first));
    std::memset(buffer.data + buffer.bytes, kBeside,
                static_cast<std::size_t>(last - buffer.data) - buffer.bytes);
    return place;
  }
  return std::nullopt;
}

}  // namespace torchkiln::emulator
