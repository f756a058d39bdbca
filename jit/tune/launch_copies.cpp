// Allocation through the launch's own allocator, copies by the driver.
// SPDX-License-Identifier: Apache-2.0
#include "jit/tune/launch_copies.h"

#include <algorithm>
#include <cstring>

#include "jit/error.h"

namespace torchkiln::jit {
namespace {

constexpr std::uint64_t kMostBytes = std::uint64_t{2} << 30;  // of all sets together
constexpr std::size_t kMostSets = 64;
// Launches that consume their input need a fresh set each: enough of them for a replay that the clock can see.
constexpr std::size_t kConsumedSets = 32;

CudaPointer device(void* pointer) { return reinterpret_cast<CudaPointer>(pointer); }

}  // namespace

LaunchCopies::LaunchCopies(Driver& driver, const torchkiln_launch& launch, std::size_t args_size)
    : driver_(driver), launch_(launch) {
  if (launch.allocator == nullptr)
    throw Error(TORCHKILN_ERROR_DRIVER, "tuning needs an allocator, and the launch has none");
  for (std::uint32_t i = 0; i < launch.n_buffers; ++i) {
    const torchkiln_buffer& b = launch.buffers[i];
    if (pointer_of(b) == nullptr || b.bytes == 0) continue;
    consumes_ |= b.access == TORCHKILN_READ_WRITE;
    if ((b.access & TORCHKILN_WRITE) != 0 && b.type != TORCHKILN_SCRATCH)
      results_.push_back({i, b.offset, b.type});
  }
  require_named(args_size);
  const CudaApi& cuda = driver.api();
  check(cuda, cuda.cuStreamSynchronize(static_cast<CudaStream>(launch.stream)),
        "cuStreamSynchronize", "tuning");
  check(cuda, cuda.cuStreamCreate(&stream_, kCudaStreamNonBlocking), "cuStreamCreate", "tuning");
  const std::size_t wanted = wanted_sets(driver);
  while (sets_.size() < wanted && add_set(args_size)) {
  }
  if (sets_.empty()) {
    cuda.cuStreamDestroy(stream_);
    throw Error(TORCHKILN_ERROR_DRIVER,
                "tuning needs memory for a copy of the launch's buffers, and there is none");
  }
  wait();
}

LaunchCopies::~LaunchCopies() {
  const CudaApi& cuda = driver_.api();
  cuda.cuStreamSynchronize(stream_);
  for (Set& set : sets_) release(set);
  cuda.cuStreamDestroy(stream_);
}

void* LaunchCopies::pointer_of(const torchkiln_buffer& buffer) const {
  void* pointer = nullptr;
  std::memcpy(&pointer, static_cast<const char*>(launch_.args) + buffer.offset, sizeof(pointer));
  return pointer;
}

// A buffer that nobody named would be the user's own in every candidate's launch.
void LaunchCopies::require_named(std::size_t args_size) {
  for (std::size_t at = 0; at + sizeof(void*) <= args_size; at += sizeof(void*)) {
    const torchkiln_buffer* end = launch_.buffers + launch_.n_buffers;
    if (std::any_of(launch_.buffers, end, [&](const auto& b) { return b.offset == at; })) continue;
    CudaPointer value = 0;
    std::memcpy(&value, static_cast<const char*>(launch_.args) + at, sizeof(value));
    unsigned kind = 0;
    const bool known = value != 0 && driver_.api().cuPointerGetAttribute(&kind, kPointerMemoryType,
                                                                         value) == kCudaSuccess;
    if (known && kind == kMemoryOfDevice) {
      throw Error(
          TORCHKILN_ERROR_INTERNAL,
          "a launch must name every buffer to be tuned; got a pointer to GPU memory at byte " +
              std::to_string(at) + " of the arguments that it does not name");
    }
  }
}

std::size_t LaunchCopies::wanted_sets(Driver& driver) const {
  std::uint64_t bytes = 1;
  for (std::uint32_t i = 0; i < launch_.n_buffers; ++i) {
    if (pointer_of(launch_.buffers[i]) != nullptr) bytes += launch_.buffers[i].bytes;
  }
  const auto l2 = static_cast<std::uint64_t>(driver.device(launch_.device).l2_bytes);
  std::uint64_t sets = 3 * l2 / bytes + 1;
  if (consumes_) sets = std::max<std::uint64_t>(sets, kConsumedSets);
  return std::clamp<std::uint64_t>(std::min(sets, kMostBytes / bytes), 1, kMostSets);
}

bool LaunchCopies::add_set(std::size_t args_size) {
  const torchkiln_allocator& memory = *launch_.allocator;
  Set set;
  set.args.assign(static_cast<const char*>(launch_.args), args_size);
  set.pointers.resize(launch_.n_buffers);
  for (std::uint32_t i = 0; i < launch_.n_buffers; ++i) {
    const torchkiln_buffer& b = launch_.buffers[i];
    if (pointer_of(b) == nullptr || b.bytes == 0) continue;
    void* owner = nullptr;
    void* pointer = memory.allocate(memory.context, b.bytes, &owner);
    if (pointer == nullptr) {
      release(set);
      return false;
    }
    set.owners.push_back(owner);
    set.pointers[i] = device(pointer);
    std::memcpy(set.args.data() + b.offset, &pointer, sizeof(pointer));
    if ((b.access & TORCHKILN_READ) != 0) copy(set, i);
  }
  sets_.push_back(std::move(set));
  return true;
}

void LaunchCopies::release(Set& set) {
  for (void* owner : set.owners) launch_.allocator->release(launch_.allocator->context, owner);
  set.owners.clear();
}

void LaunchCopies::copy(const Set& set, std::size_t buffer) {
  const torchkiln_buffer& b = launch_.buffers[buffer];
  const CudaApi& cuda = driver_.api();
  check(cuda, cuda.cuMemcpyDtoDAsync(set.pointers[buffer], device(pointer_of(b)), b.bytes, stream_),
        "cuMemcpyDtoDAsync", "tuning");
}

void LaunchCopies::reset(std::size_t set) {
  for (std::uint32_t i = 0; i < launch_.n_buffers; ++i) {
    if (launch_.buffers[i].access == TORCHKILN_READ_WRITE && sets_[set].pointers[i] != 0)
      copy(sets_[set], i);
  }
}

void LaunchCopies::clear(std::size_t set) {
  reset(set);
  const CudaApi& cuda = driver_.api();
  for (std::uint32_t i = 0; i < launch_.n_buffers; ++i) {
    const torchkiln_buffer& b = launch_.buffers[i];
    if (b.access != TORCHKILN_WRITE || sets_[set].pointers[i] == 0) continue;
    check(cuda, cuda.cuMemsetD8Async(sets_[set].pointers[i], 0, b.bytes, stream_),
          "cuMemsetD8Async", "tuning");
  }
}

std::string LaunchCopies::read(std::size_t set, const Result& result) {
  const CudaApi& cuda = driver_.api();
  std::string bytes(launch_.buffers[result.buffer].bytes, '\0');
  check(cuda,
        cuda.cuMemcpyDtoHAsync(bytes.data(), sets_[set].pointers[result.buffer], bytes.size(),
                               stream_),
        "cuMemcpyDtoHAsync", "tuning");
  wait();
  return bytes;
}

void LaunchCopies::wait() {
  check(driver_.api(), driver_.api().cuStreamSynchronize(stream_), "cuStreamSynchronize", "tuning");
}

}  // namespace torchkiln::jit
