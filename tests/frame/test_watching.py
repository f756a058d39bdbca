"""Counters, and the way of the engine's sentences into Python's logging."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import subprocess
import sys

import torchkiln
from torchkiln import _control

PREFIX = "import logging, sys\n"
# A wrong setting is the sentence that every machine can provoke; it is said when the engine starts.
WRONG = {"TORCHKILN_COMPILE_JOBS": "many"}
SENTENCE = "TORCHKILN_COMPILE_JOBS must be a whole number; got many. The default is used."


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREFIX + program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )


def test_statistics_are_whole_numbers_that_only_grow():
    counters = torchkiln.statistics()
    assert {"launches", "compiles", "hits_memory", "hits_disk", "misses", "loads"} <= set(counters)
    assert all(type(value) is int for value in counters.values())
    _control.control("nvrtc", {"load": True})
    after = torchkiln.statistics()
    assert after["nvrtc_opened"] == 1  # once in a process, whoever asked first
    assert all(after[name] >= value for name, value in counters.items())


def test_sentences_go_to_stderr_where_nobody_set_logging_up():
    assert run("import torchkiln", **WRONG).stderr == f"torchkiln: {SENTENCE}\n"


def test_sentences_go_to_the_logger():
    program = "logging.basicConfig(format='%(name)s %(levelname)s %(message)s')\nimport torchkiln"
    assert run(program, **WRONG).stderr == f"torchkiln WARNING {SENTENCE}\n"


def test_a_level_silences_them():
    program = "logging.basicConfig(level=logging.ERROR)\nimport torchkiln"
    assert run(program, **WRONG).stderr == ""


def test_a_handler_that_fails_does_not_reach_the_engine():
    program = """
class Broken(logging.Handler):
    def handle(self, record):
        raise ValueError("a broken handler")
logging.getLogger("torchkiln").addHandler(Broken())
import torchkiln
print(torchkiln.statistics()["launches"])
"""
    done = run(program, **WRONG)
    assert done.stdout == "0\n"
    assert "a broken handler" in done.stderr
