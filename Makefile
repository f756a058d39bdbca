# Sets everything up in .venv and runs it: `make demo`, `make test`; `make help` lists the rest. A second run takes
# seconds, and editing Python files rebuilds nothing.
# SPDX-License-Identifier: Apache-2.0

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-cpp test-python sanitize lint format tidy wheel compile-all packages setup clean distclean

# What the caller may set: make test WERROR=ON PYTEST_ARGS='-n 0 tests/build'
PYTHON ?=
JOBS ?= $(shell nproc)
WERROR ?= OFF
DEMO_ARGS ?=
PYTEST_ARGS ?= -n $(JOBS) --dist worksteal
# Debian packages of the same name that some tests are skipped without; .ci/run asks for them.
EXTRA_TOOLS ?=
WHEEL_LIMIT := 3000000

# Pinned: installed only where the environment has none. Whatever pins a torch of its own goes without dependencies.
TORCH := torch==2.13.0
NO_DEPS := torchvision==0.28.0 facenet-pytorch==2.6.0 scikit-image==0.26.0 \
           mmcv-lite==2.1.0 mmdet==3.3.0 mmengine==0.10.7
CLANG_TIDY := clang-tidy==23.1.4
BUILD_TOOLS := scikit-build-core>=0.11 pybind11>=3.0 cmake>=3.24 ninja>=1.11

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The environment exists, its requirements are there, our own build is in it.
CREATED := $(VENV)/pyvenv.cfg
REQUIREMENTS := $(VENV)/torchkiln-requirements.stamp
INSTALLED := $(VENV)/torchkiln-installed.stamp

# Prints the build folder of this Python; scikit-build-core names it by the wheel's tag.
build_dir := $(BIN)/python -c 'import glob, sys; print(*glob.glob("build/cp%d%d-cp*" % sys.version_info[:2]))'

# Folders count too: their time changes when a file is added or removed.
NATIVE_SOURCES := $(shell find CMakeLists.txt pyproject.toml cmake cache jit kernel_templates bindings include \
                    tests/cache tests/jit tests/emulated/emulator tests/deploy/attack/*.cpp 2>/dev/null)

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)

help:
	@cat <<-'TEXT'
	make demo         set up, then a real detector on a real photograph with our operators
	make test         set up, then all C++ and Python tests (PYTEST_ARGS='-n 0 tests/ops')
	make sanitize     the core under AddressSanitizer, UBSan and ThreadSanitizer with 10,000 damaged files; slow
	make lint         set up, then all static checks; make format mends what can be mended
	make tidy         clang-tidy over our C++ sources; slow, and not part of CI
	make wheel        dist/torchkiln-*.whl, at most $(WHEEL_LIMIT) bytes
	make compile-all  compiles every kernel variant for every architecture that NVRTC knows
	make setup        only sets up; WERROR=ON makes compiler warnings errors
	make clean        removes what was built; make distclean also removes .venv
	TEXT

demo: $(INSTALLED)
	@$(BIN)/torchkiln demo $(DEMO_ARGS)

test: test-cpp test-python

test-cpp: $(INSTALLED)
	@# The C++ tests know no Python packages: they are told where NVRTC lies.
	nvrtc='import glob, nvidia; print(next(iter(sorted(f for p in nvidia.__path__ for f in glob.glob(p + "/*/lib/libnvrtc.so.*")))))'
	export TORCHKILN_NVRTC_PATH=$${TORCHKILN_NVRTC_PATH:-$$($(BIN)/python -c "$$nvrtc")}
	$(BIN)/ctest --test-dir "$$($(build_dir))" --output-on-failure --no-tests=error -j $(JOBS)

test-python: $(INSTALLED)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# Without torch and without a real NVRTC, whose code no sanitizer has seen. ROUNDS: damaged files.
ROUNDS ?= 10000
sanitize: $(INSTALLED)
	@export TSAN_OPTIONS=die_after_fork=0 ASAN_OPTIONS=detect_leaks=0
	unset TORCHKILN_NVRTC_PATH
	for kind in address,undefined thread; do
	  export TORCHKILN_ATTACK_ROUNDS=$$([[ $$kind = thread ]] || echo $(ROUNDS))
	  folder=build/sanitize-$${kind%%,*}
	  $(BIN)/cmake -S . -B $$folder -G Ninja -DCMAKE_BUILD_TYPE=Sanitize -DCMAKE_CXX_FLAGS_SANITIZE=-O1 \
	    -DCMAKE_MAKE_PROGRAM="$$(realpath $(BIN))/ninja" -DTORCHKILN_SANITIZE=$$kind >/dev/null
	  $(BIN)/cmake --build $$folder -j $(JOBS) --target torchkiln_cache_tests torchkiln_jit_tests torchkiln_attack_worker
	  echo "$$kind: cache"
	  $$folder/torchkiln_cache_tests --gtest_brief=1
	  echo "$$kind: jit"
	  $$folder/torchkiln_jit_tests --gtest_brief=1
	  echo "$$kind: processes"
	  TORCHKILN_ATTACK_BUILD=$$folder $(BIN)/python -m pytest -q tests/deploy/attack/test_stampede.py
	done

lint: $(INSTALLED)
	@$(BIN)/python tools/lint.py

format: $(INSTALLED)
	@$(BIN)/python tools/lint.py --fix

tidy: $(INSTALLED)
	@$(has_package)
	has_package clang-tidy || $(PIP) install --quiet '$(CLANG_TIDY)'
	$(BIN)/python $(BIN)/run-clang-tidy.py -quiet -j $(JOBS) -clang-tidy-binary $(BIN)/clang-tidy \
	  -p "$$($(build_dir))" '/(cache|jit|bindings)/'

wheel: $(INSTALLED)
	@rm -f dist/torchkiln-*.whl
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	size=$$(stat -c %s dist/torchkiln-*.whl)
	echo "$$(ls dist/torchkiln-*.whl): $$size bytes"
	[[ $$size -le $(WHEEL_LIMIT) ]] || { echo "the wheel must have at most $(WHEEL_LIMIT) bytes"; exit 1; }

compile-all: $(INSTALLED)
	@$(BIN)/python tools/compile_all.py

setup: $(INSTALLED)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(INSTALLED)

distclean: clean
	rm -rf $(VENV)

# --- set-up -------------------------------------------------------------------------------------------------------

# The first Python that is new enough, by its real path: a version manager's shim may stand for any other one.
define find_python
find_python() {
  local name
  for name in $(PYTHON) python3 python3.1{4,3,2,1,0} /usr/bin/python3; do
    "$$name" -c 'import sys; sys.version_info < (3, 10) and sys.exit(1); print(sys.executable)' 2>/dev/null && return
  done
}
endef

define has_package
has_package() { $(BIN)/python -c 'import importlib.metadata, sys; importlib.metadata.version(sys.argv[1])' "$$1" 2>/dev/null; }
endef

# Debian packages that are missing, judged by what the build needs of them.
packages:
	@$(find_python)
	python=$$(find_python)
	missing=()
	command -v c++ >/dev/null || missing+=(g++)
	command -v git >/dev/null || missing+=(git)
	command -v readelf >/dev/null || missing+=(binutils)
	[[ -n $$python ]] || missing+=(python3)
	$${python:-false} -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
	$${python:-false} -c 'import os, sys, sysconfig
	sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || missing+=(python3-dev)
	for tool in $(EXTRA_TOOLS); do command -v $$tool >/dev/null || missing+=($$tool); done
	exists() { echo "#include <$$1>" | c++ -std=c++17 -fsyntax-only -x c++ - 2>/dev/null; }
	exists nlohmann/json.hpp || missing+=(nlohmann-json3-dev)
	exists gtest/gtest.h || missing+=(libgtest-dev)
	[[ $${#missing[@]} -gt 0 ]] || exit 0
	sudo=; [[ $$(id -u) -eq 0 ]] || sudo="sudo -n"
	if ! command -v apt-get >/dev/null || ! $$sudo true 2>/dev/null; then
	  echo "These packages are missing. Install them, then run make again:"
	  echo "  sudo apt-get install $${missing[*]}"
	  exit 1
	fi
	echo "Installing Debian packages: $${missing[*]}"
	$$sudo apt-get update -qq
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$${missing[@]}" >/dev/null

$(CREATED):
	@$(MAKE) --no-print-directory packages
	$(find_python)
	python=$$(find_python)
	[[ -n $$python ]] || { echo "torchkiln needs Python 3.10 or later"; exit 1; }
	options=
	$$python -c 'import importlib.metadata as m
	assert tuple(map(int, m.version("torch").split(".")[:2])) >= (2, 10)' 2>/dev/null && options=--system-site-packages
	echo "Creating $(VENV) with $$python $$options"
	$$python -m venv $$options $(VENV)
	$(PIP) install --quiet --upgrade pip

$(REQUIREMENTS): $(CREATED) Makefile
	@$(has_package)
	echo "Installing torch and the build tools"
	has_package torch || $(PIP) install --quiet '$(TORCH)'
	$(PIP) install --quiet $(foreach tool,$(BUILD_TOOLS),'$(tool)')
	touch $@

$(INSTALLED): $(REQUIREMENTS) $(NATIVE_SOURCES)
	@$(has_package)
	$(MAKE) --no-print-directory packages
	echo "Building torchkiln"
	$(PIP) install --quiet --no-build-isolation --editable '.[compiler,demo,lint,mmdet,test]' \
	  --config-settings cmake.define.TORCHKILN_BUILD_TESTS=ON \
	  --config-settings cmake.define.TORCHKILN_WERROR=$(WERROR)
	for package in $(NO_DEPS); do
	  has_package "$${package%%==*}" || $(PIP) install --quiet --no-deps "$$package"
	done
	touch $@
