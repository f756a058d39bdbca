"""Programs on a driver that runs nothing, and the command line, each in a process of its own."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of the tests' own environment nothing may leak into programs under test.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("TORCHKILN_")}


def build_folder() -> Path:
    """Where the native tests were built for this Python."""
    version = "cp{}{}".format(*sys.version_info)
    found = [
        path.parent
        for path in (ROOT / "build").glob(f"{version}-*/torchkiln_deploy_program")
        if (path.parent / "fake_cuda" / "libcuda.so.1").exists()
    ]
    if not found:
        pytest.skip("built without TORCHKILN_BUILD_TESTS")
    return found[0]


@functools.cache
def nvrtc() -> str:
    """The compiler of this Python's packages, which a C++ program cannot know by itself."""
    from torchkiln_cli import _native

    return str(_native.control("nvrtc")["candidates"][0]["path"])


@dataclass
class Machine:
    """A machine with a cache folder of its own, a fake GPU and no other one."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={
                **CLEAN,
                "TORCHKILN_CACHE_DIR": str(self.folder / "cache"),
                "TORCHKILN_NVRTC_PATH": nvrtc(),
                "LD_LIBRARY_PATH": str(build_folder() / "fake_cuda"),
                **self.environment,
                **environment,
            },
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def torchkiln(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "torchkiln_cli.main", *arguments, **environment)

    def json(self, *arguments: str, code: int = 0, **environment: str) -> Any:
        """Runs a command with --json and checks its exit code."""
        done = self.torchkiln(*arguments, "--json", **environment)
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def program(self, *dtypes: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The C++ program: box_iou in these dtypes on the fake GPU."""
        return self.run(str(build_folder() / "torchkiln_deploy_program"), *dtypes, **environment)

    def statistics(self, *dtypes: str, **environment: str) -> Any:
        done = self.program(*dtypes, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def shell(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command as an error message gives it; `torchkiln` is this Python's."""
        name = f'torchkiln() {{ {shlex.quote(sys.executable)} -m torchkiln_cli.main "$@"; }}; '
        return self.run("bash", "-c", name + command, **environment)
