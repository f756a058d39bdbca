// Reading tensors through the DLPack exchange table of their type: no allocation, no reference, no torch header.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>

#include "torchkiln/torchkiln.h"

namespace torchkiln::python {

// DLPack 1, as far as it is used here. Names and layout are the standard's.
struct DlDevice {
  std::int32_t type, id;
};
inline constexpr std::int32_t kDlCpu = 1;
inline constexpr std::int32_t kDlCuda = 2;
struct DlDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t ndim;
  DlDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // null: contiguous
  std::uint64_t byte_offset;
};
struct DlExchange {
  std::uint32_t major, minor;
  const void* older;
  void *allocate, *export_managed, *import_managed;
  int (*read)(void* object, DlTensor* out);  // valid while the object is
  int (*current_stream)(std::int32_t device_type, std::int32_t device, void** stream);
};

// A type whose objects are tensors.
struct Lender {
  PyTypeObject* type;
  const DlExchange*
      table;  // null: a subclass that answers torch's calls itself, and may have no memory
};

// Null, with no Python error, for objects that are no tensors. Needs the interpreter's lock.
const Lender* lender_of(PyObject* object);

// torch's name of each torchkiln_type: "float32".
extern const std::array<const char*, TORCHKILN_TYPE_COUNT> kDtypeNames;

// torchkiln_type; -1 for what kernels have no name for.
int type_of(DlDataType dtype);

// Row-major without gaps; sizes of 1 may have any stride.
bool is_contiguous(const DlTensor& tensor);
std::uint64_t bytes_of(const DlTensor& tensor);

}  // namespace torchkiln::python
