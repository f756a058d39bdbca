// The fake's functions: one lambda per row of the driver table.
// SPDX-License-Identifier: Apache-2.0
#include "tests/jit/support/fake_driver.h"

#include <elf.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "jit/compile/ladder.h"
#include "jit/driver/elf.h"

namespace torchkiln::jit::testing {
namespace {

FakeDriver* current = nullptr;

// The driver gets no length: a cubin ends after its section or program headers, PTX at its zero.
std::string copy_image(const void* code) {
  const char* bytes = static_cast<const char*>(code);
  if (std::memcmp(bytes, ELFMAG, SELFMAG) != 0) return std::string(bytes, std::strlen(bytes) + 1);
  Elf64_Ehdr header{};
  std::memcpy(&header, bytes, sizeof(header));
  const std::size_t sections = header.e_shoff + std::size_t{header.e_shnum} * sizeof(Elf64_Shdr);
  const std::size_t segments = header.e_phoff + std::size_t{header.e_phnum} * sizeof(Elf64_Phdr);
  return std::string(bytes, std::max(sections, segments));
}

const char* error_name(CudaResult code) {
  switch (code) {
    case kCudaSuccess:
      return "CUDA_SUCCESS";
    case kCudaOutOfMemory:
      return "CUDA_ERROR_OUT_OF_MEMORY";
    case kCudaInvalidImage:
      return "CUDA_ERROR_INVALID_IMAGE";
    case kCudaInvalidContext:
      return "CUDA_ERROR_INVALID_CONTEXT";
    case kCudaIllegalAddress:
      return "CUDA_ERROR_ILLEGAL_ADDRESS";
    default:
      return "CUDA_ERROR_OF_THE_FAKE";
  }
}

// The first bytes of what a kernel is given: its one struct, or the packed parameters.
std::string args_of(void** parameters, void** extra, std::size_t most) {
  if (parameters != nullptr) return {static_cast<const char*>(parameters[0]), most};
  const char* bytes = nullptr;
  std::size_t size = 0;
  for (; *extra != kLaunchParamEnd; extra += 2) {
    if (extra[0] == kLaunchParamBuffer) bytes = static_cast<const char*>(extra[1]);
    if (extra[0] == kLaunchParamBufferSize) size = *static_cast<const std::size_t*>(extra[1]);
  }
  return {bytes, std::min(size, most)};
}

char* host(CudaPointer pointer) { return reinterpret_cast<char*>(pointer); }

}  // namespace

// Every call: lock, remember, fail if asked to, else the body.
struct FakeCalls {
  template <class Body>
  static CudaResult call(const char* name, Body body, bool uses_context = false) {
    FakeDriver& d = *current;
    const std::scoped_lock lock(d.mutex_);
    const CudaResult refused = d.enter(name, uses_context);
    return refused == kCudaSuccess ? body(d) : refused;
  }
  template <class Body>
  static CudaResult on_context(const char* name, Body body) {
    return call(name, body, true);
  }
  static CudaResult nothing(FakeDriver&) { return kCudaSuccess; }

  template <class Handle>
  static Handle make(FakeDriver& d) {
    return reinterpret_cast<Handle>(d.next_handle_ += 16);
  }
  static FakeDriver::Function* function(CudaFunction handle) {
    return reinterpret_cast<FakeDriver::Function*>(handle);
  }

  static void fill_devices(CudaApi& api);
  static void fill_libraries(CudaApi& api);
  static void fill_launches(CudaApi& api);
  static void fill_memory(CudaApi& api);
  static void fill_events(CudaApi& api);
  static void fill_graphs(CudaApi& api);

  static CudaResult attribute(FakeDriver& d, int* value, CudaDeviceAttribute which,
                              CudaDevice device);
  static bool runs_on_a_device(const FakeDriver& d, const CubinFacts& facts);
  static CudaResult load(FakeDriver& d, CudaLibrary* library, const void* code);
  static CudaResult allocate(FakeDriver& d, void** pointer, std::size_t bytes);
  static CudaResult release(FakeDriver& d, void* pointer);
};

CudaResult FakeCalls::attribute(FakeDriver& d, int* value, CudaDeviceAttribute which,
                                CudaDevice device) {
  const torchkiln_device& facts = d.devices.at(static_cast<std::size_t>(device)).facts;
  const std::map<CudaDeviceAttribute, int> values = {
      {kDeviceMaxThreadsPerBlock, 1024},
      {kDeviceSharedBytesPerBlock, 49152},
      {kDeviceMultiprocessors, facts.multiprocessors},
      {kDeviceIntegrated, 0},
      {kDeviceL2Bytes, static_cast<int>(facts.l2_bytes)},
      {kDeviceEcc, 1},
      {kDeviceMemoryKilohertz, 3'201'000},
      {kDeviceMemoryBusBits, 6144},
      {kDeviceMajor, facts.major},
      {kDeviceMinor, facts.minor},
      {kDeviceSharedBytesPerMultiprocessor, facts.shared_bytes_per_block + 1024},
      {kDeviceSharedBytesPerBlockOptIn, facts.shared_bytes_per_block},
  };
  const auto found = values.find(which);
  if (found == values.end()) return kCudaInvalidValue;
  *value = found->second;
  return kCudaSuccess;
}

void FakeCalls::fill_devices(CudaApi& api) {
  api.cuInit = [](unsigned) { return call("cuInit", nothing); };
  api.cuDriverGetVersion = [](int* version) {
    return call("cuDriverGetVersion", [&](FakeDriver& d) { return *version = d.version, 0; });
  };
  api.cuGetErrorName = [](CudaResult result, const char** name) {
    return *name = error_name(result), kCudaSuccess;
  };
  api.cuGetErrorString = [](CudaResult, const char** text) {
    return *text = current->sentence_.c_str(), kCudaSuccess;
  };
  api.cuDeviceGet = [](CudaDevice* device, int ordinal) {
    return call("cuDeviceGet", [&](FakeDriver& d) {
      if (ordinal < 0 || ordinal >= static_cast<int>(d.devices.size())) return kCudaInvalidDevice;
      return *device = ordinal, kCudaSuccess;
    });
  };
  api.cuDeviceGetCount = [](int* count) {
    return call("cuDeviceGetCount",
                [&](FakeDriver& d) { return *count = static_cast<int>(d.devices.size()), 0; });
  };
  api.cuDeviceGetName = [](char* name, int size, CudaDevice device) {
    return call("cuDeviceGetName", [&](FakeDriver& d) {
      const std::string& text = d.devices.at(static_cast<std::size_t>(device)).name;
      return std::strncpy(name, text.c_str(), static_cast<std::size_t>(size)), kCudaSuccess;
    });
  };
  api.cuDeviceGetAttribute = [](int* value, CudaDeviceAttribute which, CudaDevice device) {
    return call("cuDeviceGetAttribute",
                [&](FakeDriver& d) { return attribute(d, value, which, device); });
  };
  api.cuDevicePrimaryCtxRetain = [](CudaContext* context, CudaDevice device) {
    return call("cuDevicePrimaryCtxRetain", [&](FakeDriver&) {
      return *context = reinterpret_cast<CudaContext>(std::uintptr_t{0x100} +
                                                      static_cast<std::uintptr_t>(device)),
             kCudaSuccess;
    });
  };
  api.cuCtxGetCurrent = [](CudaContext* context) {
    return call("cuCtxGetCurrent", [&](FakeDriver& d) {
      const auto found = d.contexts_.find(std::this_thread::get_id());
      return *context = found == d.contexts_.end() ? nullptr : found->second, kCudaSuccess;
    });
  };
  api.cuCtxSetCurrent = [](CudaContext context) {
    return call("cuCtxSetCurrent", [&](FakeDriver& d) {
      return d.contexts_[std::this_thread::get_id()] = context, kCudaSuccess;
    });
  };
  api.cuCtxGetDevice = [](CudaDevice* device) {
    return on_context("cuCtxGetDevice", [&](FakeDriver& d) {
      const auto found = d.contexts_.find(std::this_thread::get_id());
      if (found == d.contexts_.end()) return kCudaInvalidContext;
      const auto value = reinterpret_cast<std::uintptr_t>(found->second);
      return *device = static_cast<CudaDevice>(value - 0x100), kCudaSuccess;
    });
  };
}

bool FakeCalls::runs_on_a_device(const FakeDriver& d, const CubinFacts& facts) {
  return std::any_of(d.devices.begin(), d.devices.end(), [&](const FakeDriver::Device& device) {
    return binary_compatible(facts.architecture, device.facts.major * 10 + device.facts.minor);
  });
}

CudaResult FakeCalls::load(FakeDriver& d, CudaLibrary* library, const void* code) {
  std::string image = copy_image(code);
  const CubinFacts facts = inspect_cubin(image);
  if (!facts.is_elf && image.find(".version") == std::string::npos) return kCudaInvalidImage;
  d.images_.push_back(image);
  *library = make<CudaLibrary>(d);
  d.libraries_[*library] = std::make_unique<FakeDriver::Library>(FakeDriver::Library{image});
  return kCudaSuccess;
}

void FakeCalls::fill_libraries(CudaApi& api) {
  api.cuLibraryLoadData = [](CudaLibrary* library, const void* code, int*, void**, unsigned, int*,
                             void**, unsigned) {
    return call("cuLibraryLoadData", [&](FakeDriver& d) { return load(d, library, code); });
  };
  api.cuLibraryUnload = [](CudaLibrary library) {
    return call("cuLibraryUnload", [&](FakeDriver& d) {
      if (d.refuse_in_capture() != kCudaSuccess) return kCudaCaptureUnsupported;
      return d.libraries_.erase(library) == 1 ? kCudaSuccess : kCudaInvalidHandle;
    });
  };
  api.cuLibraryGetKernel = [](CudaKernel* kernel, CudaLibrary library, const char* name) {
    return call("cuLibraryGetKernel", [&](FakeDriver& d) {
      const auto found = d.libraries_.find(library);
      if (found == d.libraries_.end()) return kCudaInvalidHandle;
      const CubinFacts facts = inspect_cubin(found->second->image, name);
      if (facts.is_elf && !runs_on_a_device(d, facts)) return kCudaNoBinaryForGpu;
      if (facts.is_elf && !facts.has_symbol) return kCudaNotFound;
      d.functions_.push_back(
          std::make_unique<FakeDriver::Function>(FakeDriver::Function{found->second.get(), name}));
      return *kernel = reinterpret_cast<CudaKernel>(d.functions_.back().get()), kCudaSuccess;
    });
  };
  api.cuKernelGetFunction = [](CudaFunction* function, CudaKernel kernel) {
    return on_context("cuKernelGetFunction", [&](FakeDriver&) {
      return *function = reinterpret_cast<CudaFunction>(kernel), kCudaSuccess;
    });
  };
  api.cuKernelSetAttribute = [](CudaFunctionAttribute which, int value, CudaKernel kernel,
                                CudaDevice) {
    return call("cuKernelSetAttribute", [&](FakeDriver& d) {
      return d.attributes_[{reinterpret_cast<CudaFunction>(kernel), which}] = value, kCudaSuccess;
    });
  };
  api.cuFuncSetAttribute = [](CudaFunction handle, CudaFunctionAttribute which, int value) {
    return on_context("cuFuncSetAttribute", [&](FakeDriver& d) {
      return d.attributes_[{handle, which}] = value, kCudaSuccess;
    });
  };
  api.cuFuncGetAttribute = [](int* value, CudaFunctionAttribute which, CudaFunction handle) {
    return on_context("cuFuncGetAttribute", [&](FakeDriver& d) {
      const auto usual = d.kernel_attributes.find(which);
      const int unset = usual != d.kernel_attributes.end() ? usual->second : 0;
      return *value = d.attributes_.try_emplace({handle, which}, unset).first->second, kCudaSuccess;
    });
  };
  api.cuFuncLoad = [](CudaFunction) { return on_context("cuFuncLoad", nothing); };
  api.cuOccupancyMaxActiveBlocksPerMultiprocessor = [](int* blocks, CudaFunction, int size,
                                                       std::size_t) {
    return on_context("cuOccupancyMaxActiveBlocksPerMultiprocessor",
                      [&](FakeDriver&) { return *blocks = 2048 / std::max(size, 1), 0; });
  };
}

void FakeCalls::fill_launches(CudaApi& api) {
  api.cuLaunchKernel = [](CudaFunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                          CudaStream stream, void** parameters, void** extra) {
    return call(
        "cuLaunchKernel",
        [&](FakeDriver& d) {
          const std::string args = args_of(parameters, extra, d.args_bytes);
          return d.launch({function(handle)->name,
                           {grid_x, grid_y, grid_z},
                           {block_x, block_y, block_z},
                           shared,
                           stream,
                           args,
                           false,
                           false,
                           &function(handle)->library->image});
        },
        stream == nullptr);
  };
  api.cuLaunchKernelEx = [](const CudaLaunchConfig* c, CudaFunction handle, void** parameters,
                            void** extra) {
    return call(
        "cuLaunchKernelEx",
        [&](FakeDriver& d) {
          const std::string args = args_of(parameters, extra, d.args_bytes);
          return d.launch({function(handle)->name,
                           {c->grid[0], c->grid[1], c->grid[2]},
                           {c->block[0], c->block[1], c->block[2]},
                           c->dynamic_shared_bytes,
                           c->stream,
                           args,
                           false,
                           false,
                           &function(handle)->library->image});
        },
        c->stream == nullptr);
  };
  api.cuStreamCreate = [](CudaStream* stream, unsigned) {
    return on_context("cuStreamCreate",
                      [&](FakeDriver& d) { return *stream = make<CudaStream>(d), 0; });
  };
  api.cuStreamDestroy = [](CudaStream) { return on_context("cuStreamDestroy", nothing); };
  api.cuStreamSynchronize = [](CudaStream) {
    return on_context("cuStreamSynchronize", [](FakeDriver& d) { return d.refuse_in_capture(); });
  };
  api.cuStreamQuery = [](CudaStream) { return on_context("cuStreamQuery", nothing); };
  api.cuStreamIsCapturing = [](CudaStream stream, CudaCaptureStatus* status) {
    return on_context("cuStreamIsCapturing", [&](FakeDriver& d) {
      const bool active = d.capturing_.contains(stream);
      *status = !active ? kCaptureNone : d.invalidated_ ? kCaptureInvalidated : kCaptureActive;
      return kCudaSuccess;
    });
  };
}

CudaResult FakeCalls::allocate(FakeDriver& d, void** pointer, std::size_t bytes) {
  if (d.refuse_in_capture() != kCudaSuccess) return kCudaCaptureUnsupported;
  if (bytes == 0) return kCudaInvalidValue;
  auto memory = std::make_unique<char[]>(bytes);
  *pointer = memory.get();
  d.memory_[*pointer] = std::move(memory);
  return kCudaSuccess;
}

CudaResult FakeCalls::release(FakeDriver& d, void* pointer) {
  if (d.refuse_in_capture() != kCudaSuccess) return kCudaCaptureUnsupported;
  return d.memory_.erase(pointer) == 1 ? kCudaSuccess : kCudaInvalidValue;
}

void FakeCalls::fill_memory(CudaApi& api) {
  api.cuPointerGetAttribute = [](void* value, CudaPointerAttribute, CudaPointer pointer) {
    return on_context("cuPointerGetAttribute", [&](FakeDriver& d) {
      if (!d.memory_.contains(host(pointer))) return kCudaInvalidValue;
      return *static_cast<unsigned*>(value) = kMemoryOfDevice, kCudaSuccess;
    });
  };
  api.cuMemAlloc = [](CudaPointer* device, std::size_t bytes) {
    return on_context("cuMemAlloc", [&](FakeDriver& d) {
      void* pointer = nullptr;
      const CudaResult result = allocate(d, &pointer, bytes);
      return *device = reinterpret_cast<CudaPointer>(pointer), result;
    });
  };
  api.cuMemFree = [](CudaPointer device) {
    return on_context("cuMemFree", [&](FakeDriver& d) { return release(d, host(device)); });
  };
  api.cuMemHostAlloc = [](void** pointer, std::size_t bytes, unsigned) {
    return on_context("cuMemHostAlloc", [&](FakeDriver& d) { return allocate(d, pointer, bytes); });
  };
  api.cuMemFreeHost = [](void* pointer) {
    return on_context("cuMemFreeHost", [&](FakeDriver& d) { return release(d, pointer); });
  };
  api.cuMemHostGetDevicePointer = [](CudaPointer* device, void* pointer, unsigned) {
    return on_context("cuMemHostGetDevicePointer", [&](FakeDriver&) {
      return *device = reinterpret_cast<CudaPointer>(pointer), kCudaSuccess;
    });
  };
  api.cuMemcpyDtoHAsync = [](void* to, CudaPointer from, std::size_t bytes, CudaStream) {
    return on_context("cuMemcpyDtoHAsync",
                      [&](FakeDriver&) { return std::memcpy(to, host(from), bytes), 0; });
  };
  api.cuMemcpyHtoDAsync = [](CudaPointer to, const void* from, std::size_t bytes, CudaStream) {
    return on_context("cuMemcpyHtoDAsync",
                      [&](FakeDriver&) { return std::memcpy(host(to), from, bytes), 0; });
  };
  api.cuMemcpyDtoDAsync = [](CudaPointer to, CudaPointer from, std::size_t bytes, CudaStream) {
    return on_context("cuMemcpyDtoDAsync",
                      [&](FakeDriver&) { return std::memcpy(host(to), host(from), bytes), 0; });
  };
  api.cuMemsetD8Async = [](CudaPointer to, unsigned char value, std::size_t bytes, CudaStream) {
    return on_context("cuMemsetD8Async",
                      [&](FakeDriver&) { return std::memset(host(to), value, bytes), 0; });
  };
}

void FakeCalls::fill_events(CudaApi& api) {
  api.cuEventCreate = [](CudaEvent* event, unsigned) {
    return on_context("cuEventCreate",
                      [&](FakeDriver& d) { return *event = make<CudaEvent>(d), 0; });
  };
  api.cuEventDestroy = [](CudaEvent event) {
    return on_context("cuEventDestroy",
                      [&](FakeDriver& d) { return d.events_.erase(event), kCudaSuccess; });
  };
  api.cuEventRecord = [](CudaEvent event, CudaStream) {
    return on_context("cuEventRecord",
                      [&](FakeDriver& d) { return d.events_[event] = d.clock_ms_, kCudaSuccess; });
  };
  api.cuEventSynchronize = [](CudaEvent) {
    return on_context("cuEventSynchronize", [](FakeDriver& d) { return d.refuse_in_capture(); });
  };
  api.cuEventElapsedTime = [](float* milliseconds, CudaEvent start, CudaEvent end) {
    return on_context("cuEventElapsedTime", [&](FakeDriver& d) {
      if (!d.events_.contains(start) || !d.events_.contains(end)) return kCudaInvalidHandle;
      *milliseconds = static_cast<float>(d.events_[end] - d.events_[start]);
      return kCudaSuccess;
    });
  };
}

void FakeCalls::fill_graphs(CudaApi& api) {
  api.cuStreamBeginCapture = [](CudaStream stream, CudaCaptureMode) {
    return on_context("cuStreamBeginCapture", [&](FakeDriver& d) {
      return d.capturing_[stream] = {}, d.invalidated_ = false, kCudaSuccess;
    });
  };
  api.cuStreamEndCapture = [](CudaStream stream, CudaGraph* graph) {
    return on_context("cuStreamEndCapture", [&](FakeDriver& d) {
      auto node = d.capturing_.extract(stream);
      *graph = nullptr;
      if (node.empty()) return kCudaInvalidValue;
      if (d.invalidated_) return kCudaCaptureInvalidated;
      *graph = make<CudaGraph>(d);
      d.graphs_[*graph] = std::make_unique<FakeDriver::Graph>(std::move(node.mapped()));
      return kCudaSuccess;
    });
  };
  api.cuGraphInstantiateWithFlags = [](CudaGraphExec* executable, CudaGraph graph,
                                       unsigned long long) {
    return on_context("cuGraphInstantiateWithFlags", [&](FakeDriver& d) {
      if (!d.graphs_.contains(graph)) return kCudaInvalidHandle;
      *executable = make<CudaGraphExec>(d);
      return d.executables_[*executable] = *d.graphs_[graph], kCudaSuccess;
    });
  };
  api.cuGraphLaunch = [](CudaGraphExec executable, CudaStream stream) {
    return on_context("cuGraphLaunch", [&](FakeDriver& d) {
      if (!d.executables_.contains(executable)) return kCudaInvalidHandle;
      for (FakeDriver::Launch launch : d.executables_[executable].launches) {
        launch.stream = stream;
        launch.captured = false;
        launch.from_graph = true;
        if (const CudaResult failed = d.launch(launch); failed != kCudaSuccess) return failed;
      }
      return kCudaSuccess;
    });
  };
  api.cuGraphExecDestroy = [](CudaGraphExec executable) {
    return on_context("cuGraphExecDestroy", [&](FakeDriver& d) {
      return d.executables_.erase(executable) == 1 ? kCudaSuccess : kCudaInvalidHandle;
    });
  };
  api.cuGraphDestroy = [](CudaGraph graph) {
    return on_context("cuGraphDestroy", [&](FakeDriver& d) {
      return d.graphs_.erase(graph) == 1 ? kCudaSuccess : kCudaInvalidHandle;
    });
  };
}

FakeDriver::FakeDriver() {
  if (current != nullptr) throw std::logic_error("only one FakeDriver may live at a time");
  current = this;
}

FakeDriver::~FakeDriver() { current = nullptr; }

CudaApi FakeDriver::api() {
  CudaApi api;
  FakeCalls::fill_devices(api);
  FakeCalls::fill_libraries(api);
  FakeCalls::fill_launches(api);
  FakeCalls::fill_memory(api);
  FakeCalls::fill_events(api);
  FakeCalls::fill_graphs(api);
  return api;
}

void FakeDriver::fail(const std::string& call, CudaResult code, int times) {
  const std::scoped_lock lock(mutex_);
  failures_[call] = {code, times};
}

void FakeDriver::set_capturing(CudaStream stream, bool on) {
  const std::scoped_lock lock(mutex_);
  invalidated_ = false;
  if (on) {
    capturing_[stream] = {};
  } else {
    capturing_.erase(stream);
  }
}

std::vector<std::string> FakeDriver::calls() const {
  const std::scoped_lock lock(mutex_);
  return calls_;
}

int FakeDriver::count(const std::string& call) const {
  const std::scoped_lock lock(mutex_);
  return static_cast<int>(std::count(calls_.begin(), calls_.end(), call));
}

std::vector<FakeDriver::Launch> FakeDriver::launches() const {
  const std::scoped_lock lock(mutex_);
  return launches_;
}

std::vector<std::string> FakeDriver::images() const {
  const std::scoped_lock lock(mutex_);
  return images_;
}

bool FakeDriver::capture_invalidated() const {
  const std::scoped_lock lock(mutex_);
  return invalidated_;
}

std::size_t FakeDriver::live_allocations() const {
  const std::scoped_lock lock(mutex_);
  return memory_.size();
}

CudaResult FakeDriver::enter(const char* call, bool uses_context) {
  calls_.emplace_back(call);
  const auto failure = failures_.find(call);
  if (failure != failures_.end() && failure->second.times != 0) {
    if (failure->second.times > 0) --failure->second.times;
    return failure->second.code;
  }
  const auto context = contexts_.find(std::this_thread::get_id());
  const bool has_context = context != contexts_.end() && context->second != nullptr;
  return uses_context && needs_context && !has_context ? kCudaInvalidContext : kCudaSuccess;
}

CudaResult FakeDriver::refuse_in_capture() {
  if (capturing_.empty()) return kCudaSuccess;
  invalidated_ = true;
  return kCudaCaptureUnsupported;
}

CudaResult FakeDriver::launch(Launch launch) {
  const auto capture = capturing_.find(launch.stream);
  launch.captured = capture != capturing_.end();
  if (launch.captured) {
    capture->second.launches.push_back(launch);
  } else {
    clock_ms_ += cost(launch);
  }
  launches_.push_back(launch);
  try {
    if (effect && !launch.captured) effect(launch);
  } catch (const std::exception& error) {
    sentence_ = error.what();
    return kCudaIllegalAddress;
  }
  return kCudaSuccess;
}

}  // namespace torchkiln::jit::testing
