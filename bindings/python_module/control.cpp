// The pybind11 module `_control`: cold commands, the thread's error record, warnings to Python's logging, the launcher of
// users' kernels. Thin on purpose: it is the only part that is built per Python version.
//
// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "bindings/python_module/declared.h"
#include "bindings/python_module/gil.h"
#include "bindings/python_module/launcher.h"
#include "torchkiln/torchkiln.h"

namespace py = pybind11;

namespace torchkiln::python {
namespace {

py::object from_json(const std::string& text) {
  return py::module_::import("json").attr("loads")(text);
}

py::dict last_error() {
  const torchkiln_error* e = torchkiln_last_error();
  py::dict result;
  result["kind"] = e->kind;
  result["argument"] = e->argument;
  result["message"] = e->message;
  result["details"] = from_json(e->details);
  return result;
}

py::object control(const std::string& command, const py::object& request) {
  const auto text = py::module_::import("json").attr("dumps")(request).cast<std::string>();
  char* reply = nullptr;
  PyThreadState* const thread = PyEval_SaveThread();  // a compile takes a while
  const std::int32_t status = torchkiln_control(command.c_str(), text.c_str(), &reply);
  take_lock_again(thread);
  const std::unique_ptr<char, decltype(&torchkiln_free)> owner(reply, &torchkiln_free);
  if (raise_kept_error()) throw py::error_already_set();
  if (status != 0) throw std::runtime_error(torchkiln_last_error()->message);
  return from_json(reply);
}

// What the engine says goes to the logger "torchkiln"; where nobody has set logging up, to stderr as without Python.
void say(void*, std::int32_t level, const char* sentence) {
  const py::gil_scoped_acquire gil;
  try {
    const auto logger = py::module_::import("logging").attr("getLogger")("torchkiln");
    if (logger.attr("hasHandlers")().cast<bool>()) {
      logger.attr("log")(level, "%s", sentence);
    } else {
      PySys_FormatStderr("torchkiln: %s\n", sentence);
    }
  } catch (py::error_already_set& error) {
    error.discard_as_unraisable(
        "torchkiln: logging");  // a handler's error must not reach the engine
  }
}

void speak_through_python() {
  torchkiln_set_log_sink(&say, nullptr);
  // A compile may outlive the interpreter. Threads that are inside `say` need the lock to leave it.
  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    const py::gil_scoped_release release;
    torchkiln_set_log_sink(nullptr, nullptr);
  }));
}

// Ctrl-C while a launch is being tuned: the tuner ends early, and Python raises KeyboardInterrupt when the call is back.
std::int32_t interrupted(void*) {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() == 0) return 0;
  PyErr_Clear();
  PyErr_SetInterrupt();  // again: the launch in between cannot carry an exception
  return 1;
}

// NVRTC may be a package in one of Python's site folders; the engine cannot know them by itself.
void tell_site_directories() {
  py::list folders;
  for (const py::handle entry : py::module_::import("sys").attr("path")) {
    const auto path = entry.cast<std::string>();
    if (path.ends_with("site-packages") || path.ends_with("dist-packages")) folders.append(path);
  }
  py::dict request;
  request["paths"] = folders;
  control("set_site_directories", request);
}

// Before Python takes itself down, and whichever thread loaded this module: the engine's own exit handlers come later,
// and only the main thread's come before those of a compiler that is just being opened.
void stop_at_exit() {
  py::module_::import("atexit").attr("register")(
      py::cpp_function([] { control("stop_for_exit", py::dict()); }));
}

void add_template(const std::string& path, const std::string& text) {
  if (torchkiln_add_template(path.c_str(), text.c_str()) == 0) return;
  raise_engine_error();
  throw py::error_already_set();
}

}  // namespace
}  // namespace torchkiln::python

PYBIND11_MODULE(_control, m) {
  using namespace torchkiln::python;  // NOLINT: of this one function
  m.doc() = "Control of the torchkiln engine: JSON commands and the error record of this thread.";
  m.def("control", &control, py::arg("command"), py::arg("request") = py::dict(),
        "Runs a cold command; raises RuntimeError and leaves its data in last_error().");
  m.def("last_error", &last_error,
        "The last failure on this thread: kind, argument, message, details.");
  m.def("version", &torchkiln_version, "Version of the engine library.");
  m.def("add_template", &add_template, py::arg("path"), py::arg("text"),
        "Adds a file of a user's own kernels; raises as torchkiln_add_template says.");
  add_launcher(m);
  speak_through_python();
  torchkiln_set_interrupt(&interrupted, nullptr);
  tell_site_directories();
  stop_at_exit();
}
