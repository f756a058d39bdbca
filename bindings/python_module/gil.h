// Giving the interpreter's lock away and taking it back.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace torchkiln::python {

[[noreturn]] inline void sleep_until_the_process_is_gone() {
  while (true) ::pause();
}

// In an interpreter that ends, taking the lock ends a daemon thread by unwinding its stack: out of a destructor, where
// pybind11 would take it, that ends the process, and elsewhere it frees Python objects without the lock. So such a
// thread sleeps, as from Python 3.14 on.
inline void take_lock_again(PyThreadState* thread) {
#if PY_VERSION_HEX >= 0x030d0000
  const bool ends = Py_IsFinalizing() != 0;
#else
  const bool ends = _Py_IsFinalizing() != 0;
#endif
  if (ends) sleep_until_the_process_is_gone();
  try {
    PyEval_RestoreThread(thread);
  } catch (abi::__forced_unwind&) {  // the end began while this thread waited
    sleep_until_the_process_is_gone();
  }
}

}  // namespace torchkiln::python
