// Tensors by the exchange table.
// SPDX-License-Identifier: Apache-2.0
#include "bindings/python_module/tensor.h"

#include <cstring>
#include <deque>
#include <span>

namespace torchkiln::python {
namespace {

// The standard's codes, in the order of torchkiln_type.
constexpr std::array<DlDataType, TORCHKILN_TYPE_COUNT> kDlTypes = {{{2, 32, 1},
                                                                    {2, 16, 1},
                                                                    {4, 16, 1},
                                                                    {2, 64, 1},
                                                                    {0, 32, 1},
                                                                    {0, 64, 1},
                                                                    {1, 8, 1},
                                                                    {6, 8, 1},
                                                                    {0, 8, 1},
                                                                    {0, 16, 1},
                                                                    {1, 16, 1},
                                                                    {1, 32, 1},
                                                                    {1, 64, 1}}};

PyObject* attribute_of(PyTypeObject* type, const char* name) {
  PyObject* value = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name);
  if (value == nullptr) PyErr_Clear();
  return value;
}

// Whether torch hands calls on this type's objects to the type itself, as FakeTensor asks for.
bool answers_calls_itself(PyTypeObject* type) {
  PyObject* answer = attribute_of(type, "__torch_dispatch__");
  if (answer == nullptr) return false;
  PyObject* name = PyObject_GetAttrString(answer, "__name__");
  const char* text = name == nullptr ? nullptr : PyUnicode_AsUTF8(name);
  const bool disabled = text != nullptr && std::strcmp(text, "_disabled_torch_dispatch_impl") == 0;
  PyErr_Clear();
  Py_XDECREF(name);
  Py_DECREF(answer);
  return !disabled;
}

const DlExchange* table_of(PyTypeObject* type) {
  PyObject* capsule = attribute_of(type, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return nullptr;
  const auto* table =
      static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  PyErr_Clear();
  Py_DECREF(capsule);  // the table lives as long as the process
  const bool usable = table != nullptr && table->major == 1 && table->read != nullptr &&
                      table->current_stream != nullptr;
  return usable ? table : nullptr;
}

}  // namespace

const std::array<const char*, TORCHKILN_TYPE_COUNT> kDtypeNames = {
    "float32", "float16", "bfloat16", "float64", "int32",  "int64", "uint8",
    "bool",    "int8",    "int16",    "uint16",  "uint32", "uint64"};

const Lender* lender_of(PyObject* object) {
  // Few types, kept for good; the first to come is torch.Tensor.
  static std::deque<Lender>& known = *new std::deque<Lender>;
  PyTypeObject* type = Py_TYPE(object);
  for (const Lender& lender : known) {
    if (lender.type == type) return &lender;
  }
  const DlExchange* table = table_of(type);
  if (table == nullptr) return nullptr;
  Py_INCREF(reinterpret_cast<PyObject*>(type));
  known.push_back({type, answers_calls_itself(type) ? nullptr : table});
  return &known.back();
}

int type_of(DlDataType dtype) {
  for (std::size_t i = 0; i < kDlTypes.size(); ++i) {
    const DlDataType& known = kDlTypes.at(i);
    if (dtype.code == known.code && dtype.bits == known.bits && dtype.lanes == 1)
      return static_cast<int>(i);
  }
  return -1;
}

bool is_contiguous(const DlTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t expected = 1;
  bool gapless = true;
  for (std::int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return true;
    gapless = gapless && (tensor.shape[i] == 1 || tensor.strides[i] == expected);
    expected *= tensor.shape[i];
  }
  return gapless;
}

std::uint64_t bytes_of(const DlTensor& tensor) {
  std::uint64_t count = 1;
  for (std::int32_t i = 0; i < tensor.ndim; ++i)
    count *= static_cast<std::uint64_t>(tensor.shape[i]);
  return count * tensor.dtype.bits / 8;
}

}  // namespace torchkiln::python
