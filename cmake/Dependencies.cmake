# Finds what the build needs, and says which package to install when something is missing.
# SPDX-License-Identifier: Apache-2.0

# A plain build uses the environment that `make` sets up, unless another one is active or named.
set(torchkiln_venv_python "${PROJECT_SOURCE_DIR}/.venv/bin/python")
if(NOT DEFINED Python_EXECUTABLE AND NOT DEFINED ENV{VIRTUAL_ENV} AND EXISTS "${torchkiln_venv_python}")
  set(Python_EXECUTABLE "${torchkiln_venv_python}")
endif()
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(Threads REQUIRED)

find_package(nlohmann_json 3.9 QUIET)
if(NOT nlohmann_json_FOUND)
  message(FATAL_ERROR "nlohmann-json was not found. On Debian or Ubuntu: apt-get install nlohmann-json3-dev. "
                      "Elsewhere: install it and add its prefix to CMAKE_PREFIX_PATH.")
endif()

# Asks the Python of this build. The answer is empty when the command fails.
function(torchkiln_ask_python result code)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "${code}"
    OUTPUT_VARIABLE answer OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${result} "${answer}" PARENT_SCOPE)
endfunction()

macro(torchkiln_find_pybind11)
  if(NOT pybind11_DIR)
    torchkiln_ask_python(torchkiln_pybind11_dir "import pybind11; print(pybind11.get_cmake_dir())")
  endif()
  set(PYBIND11_FINDPYTHON ON)
  find_package(pybind11 3.0 QUIET HINTS "${torchkiln_pybind11_dir}")
  if(NOT pybind11_FOUND)
    message(FATAL_ERROR "pybind11 3.0 or later was not found. Install it with: ${Python_EXECUTABLE} -m pip install pybind11")
  endif()
endmacro()

macro(torchkiln_find_gtest)
  find_package(GTest QUIET)
  if(NOT GTest_FOUND)
    message(FATAL_ERROR "GoogleTest was not found. On Debian or Ubuntu: apt-get install libgtest-dev. "
                        "Or build without the C++ tests: -DTORCHKILN_BUILD_TESTS=OFF.")
  endif()
  include(GoogleTest)
endmacro()

# Sets `result` to the include folder of torch. torch is not imported: its headers are enough, and under pip's build
# isolation it could not be imported, while sysconfig still names the environment that holds it.
function(torchkiln_find_torch_headers result)
  set(include "${TORCHKILN_TORCH_INCLUDE}")
  if(NOT include)
    torchkiln_ask_python(include [[
import importlib.util, os, site, sys, sysconfig
spec = importlib.util.find_spec("torch")
base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
paths = [os.path.dirname(p) for p in (spec.submodule_search_locations or [])] if spec else []
paths += [sysconfig.get_path(kind, vars=v) for v in (None, base) for kind in ("purelib", "platlib")]
paths += [*site.getsitepackages(), site.getusersitepackages()]
folders = (os.path.join(p, "torch", "include") for p in paths)
print(next((f for f in folders if os.path.isdir(os.path.join(f, "torch", "csrc", "stable"))), ""))
]])
  endif()
  if(NOT EXISTS "${include}/torch/csrc/stable/library.h")
    message(FATAL_ERROR
      "The headers of torch 2.10 or later were not found (looked in '${include}' and in the environment of "
      "${Python_EXECUTABLE}). Install torch there first, for example: ${Python_EXECUTABLE} -m pip install torch. "
      "Or name the folder that holds torch/csrc/stable: -DTORCHKILN_TORCH_INCLUDE=<folder>.")
  endif()
  message(STATUS "torchkiln: torch headers in ${include}")
  set(${result} "${include}" PARENT_SCOPE)
endfunction()
