// cuDeviceGetAttribute and friends.
// SPDX-License-Identifier: Apache-2.0
#include "jit/driver/device.h"

#include <algorithm>
#include <array>
#include <cctype>

#include "cache/sha256.h"
#include "jit/error.h"

namespace torchkiln::jit {
namespace {

CudaDevice device_handle(const CudaApi& cuda, int ordinal) {
  const int count = device_count(cuda);
  if (ordinal < 0 || ordinal >= count) {
    throw Error(TORCHKILN_ERROR_VALUE,
                "device: the index must be below the number of visible GPUs, " +
                    std::to_string(count) + "; got " + std::to_string(ordinal) +
                    ". CUDA_VISIBLE_DEVICES decides which GPUs are visible.",
                {}, "device");
  }
  CudaDevice device = 0;
  check(cuda, cuda.cuDeviceGet(&device, ordinal), "cuDeviceGet",
        "device " + std::to_string(ordinal));
  return device;
}

int attribute(const CudaApi& cuda, CudaDevice device, CudaDeviceAttribute which) {
  int value = 0;
  check(cuda, cuda.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute",
        "device attribute " + std::to_string(which));
  return value;
}

struct DataSheet {
  int architecture;
  int multiprocessors;
  int shared_kilobytes;  // of one block, with opt-in
  int l2_megabytes;
};

constexpr std::array kDataSheets = {
    DataSheet{75, 40, 64, 4},       // T4
    DataSheet{80, 108, 163, 40},    // A100
    DataSheet{86, 84, 99, 6},       // A40
    DataSheet{87, 16, 163, 4},      // Jetson AGX Orin
    DataSheet{89, 142, 99, 96},     // L40
    DataSheet{90, 132, 227, 50},    // H100, H200
    DataSheet{100, 148, 227, 126},  // B200
    DataSheet{110, 20, 227, 32},    // Jetson Thor
    DataSheet{120, 170, 99, 96},    // GeForce RTX 5090
    DataSheet{121, 48, 99, 24},     // GB10
};

torchkiln_device device_of(const DataSheet& sheet, int architecture) {
  torchkiln_device facts{};
  facts.major = architecture / 10;
  facts.minor = architecture % 10;
  facts.multiprocessors = sheet.multiprocessors;
  facts.shared_bytes_per_block = sheet.shared_kilobytes * 1024;
  facts.l2_bytes = std::int64_t{sheet.l2_megabytes} << 20;
  return facts;
}

}  // namespace

torchkiln_device typical_device(int architecture) {
  const auto* newer =
      std::find_if(kDataSheets.begin(), kDataSheets.end(),
                   [&](const DataSheet& sheet) { return sheet.architecture > architecture; });
  return device_of(newer == kDataSheets.begin() ? *newer : *(newer - 1), architecture);
}

std::vector<torchkiln_device> typical_devices() {
  std::vector<torchkiln_device> devices;
  for (const DataSheet& sheet : kDataSheets)
    devices.push_back(device_of(sheet, sheet.architecture));
  return devices;
}

int device_count(const CudaApi& cuda) {
  int count = 0;
  check(cuda, cuda.cuDeviceGetCount(&count), "cuDeviceGetCount", "CUDA driver");
  return count;
}

torchkiln_device query_device(const CudaApi& cuda, int ordinal) {
  const CudaDevice device = device_handle(cuda, ordinal);
  torchkiln_device facts{};
  facts.major = attribute(cuda, device, kDeviceMajor);
  facts.minor = attribute(cuda, device, kDeviceMinor);
  facts.multiprocessors = attribute(cuda, device, kDeviceMultiprocessors);
  facts.shared_bytes_per_block = attribute(cuda, device, kDeviceSharedBytesPerBlockOptIn);
  facts.l2_bytes = attribute(cuda, device, kDeviceL2Bytes);
  return facts;
}

std::string compute_mode(const CudaApi& cuda, int ordinal) {
  switch (attribute(cuda, device_handle(cuda, ordinal), kDeviceComputeMode)) {
    case 2:
      return "prohibited";
    case 3:
      return "exclusive process";
    default:
      return "default";
  }
}

std::string device_name(const CudaApi& cuda, int ordinal) {
  std::array<char, 256> name{};
  // One byte is kept back: nothing promises that a cut name ends with a zero.
  check(cuda,
        cuda.cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1,
                             device_handle(cuda, ordinal)),
        "cuDeviceGetName", "device " + std::to_string(ordinal));
  return name.data();
}

nlohmann::json DeviceIdentity::to_json() const {
  return {{"name", name},
          {"architecture", architecture},
          {"multiprocessors", multiprocessors},
          {"l2_bytes", l2_bytes},
          {"memory_bus_bits", memory_bus_bits},
          {"memory_kilohertz", memory_kilohertz},
          {"ecc", ecc}};
}

std::optional<DeviceIdentity> DeviceIdentity::from_json(const nlohmann::json& json) try {
  return DeviceIdentity{json.at("name").get<std::string>(),
                        json.at("architecture").get<int>(),
                        json.at("multiprocessors").get<int>(),
                        json.at("l2_bytes").get<std::int64_t>(),
                        json.at("memory_bus_bits").get<int>(),
                        json.at("memory_kilohertz").get<int>(),
                        json.at("ecc").get<bool>()};
} catch (const nlohmann::json::exception&) {
  return std::nullopt;
}

std::string DeviceIdentity::id() const {
  constexpr std::size_t kMostName = 64, kDigits = 8;
  std::string slug;
  for (const char c : name.substr(0, kMostName)) {
    const auto byte = static_cast<unsigned char>(c);
    if (std::isalnum(byte) != 0) {
      slug += static_cast<char>(std::tolower(byte));
    } else if (!slug.empty() && slug.back() != '-') {
      slug += '-';
    }
  }
  return slug + (slug.ends_with('-') ? "" : "-") +
         cache::sha256_hex(to_json().dump()).substr(0, kDigits);
}

DeviceIdentity query_identity(const CudaApi& cuda, int ordinal) {
  const CudaDevice device = device_handle(cuda, ordinal);
  return {device_name(cuda, ordinal),
          10 * attribute(cuda, device, kDeviceMajor) + attribute(cuda, device, kDeviceMinor),
          attribute(cuda, device, kDeviceMultiprocessors),
          attribute(cuda, device, kDeviceL2Bytes),
          attribute(cuda, device, kDeviceMemoryBusBits),
          attribute(cuda, device, kDeviceMemoryKilohertz),
          attribute(cuda, device, kDeviceEcc) != 0};
}

}  // namespace torchkiln::jit
