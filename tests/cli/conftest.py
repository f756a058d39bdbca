"""Runs commands: in this process on a fake engine, or in one of their own on the real one."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from torchkiln_cli import _native
from torchkiln_cli.main import cli

VERSION = importlib.metadata.version("torchkiln")
ARCHITECTURES = [75, 80, 90, 120]


class FakeEngine:
    """Answers commands from a table of replies, errors and functions of the request."""

    def __init__(self) -> None:
        self.compiled: set[tuple[str, str]] = set()
        compiler = {"path": "/lib/libnvrtc.so.13", "compiler": "13.5-ab"}
        entry = {"compiler": "13.5-ab", "bytes": 4096}
        self.replies: dict[str, Any] = {
            "expand": self._expand,
            "compile": self._compile,
            "nvrtc": {
                "candidates": [{**compiler, "why": "pip"}],
                **compiler,
                "version": "13.5",
                "architectures": ARCHITECTURES,
            },
            "ladder": {
                "rungs": [
                    {"target": "sm_90", "reason": "exact machine code (sm_90) by NVRTC 13.5"}
                ],
                "explanation": "device of sm_90",
            },
            "driver": {"version": 13000, "devices": [{"name": "GPU X", "major": 9, "minor": 0}]},
            "settings": {
                "values": {"warnings": []},
                "variables": [{"name": "TORCHKILN_CACHE_DIR", "meaning": "folder"}],
                "unknown": [],
            },
            "cache.stat": {
                "state": "ok",
                "readable": True,
                "writable": True,
                "entries": 2,
                "bytes": 4096,
                "limit_bytes": 2**30,
            },
            "cache.list": {
                "entries": [
                    {**entry, "key": "00" * 32, "used": 1, "path": "/c/0"},
                    {
                        **entry,
                        "key": "11" * 32,
                        "used": 2,
                        "path": "/c/1",
                        "specialization": "detection/nms.mask<float>",
                        "arch": "sm_90",
                        "registers": 32,
                    },
                ]
            },
            "cache.clear": {"freed_bytes": 8192},
            "bundles": {"bundles": [], "refused": []},
            "records.examine": {
                "files": [],
                "writable": True,
                "state": "ok",
                "devices": [],
            },
            "selftest.store": {"checks": [{"name": "publish", "ok": True, "fact": "linked"}]},
        }

    def control(self, command: str, **request: Any) -> dict[str, Any]:
        reply = self.replies[command]
        if callable(reply):
            reply = reply(request)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    @staticmethod
    def error(message: str, kind: int = 4) -> _native.ControlError:
        return _native.ControlError(
            {"kind": kind, "argument": "", "message": message, "details": {}}
        )

    def _expand(self, request: dict[str, Any]) -> dict[str, Any]:
        for name in request["operators"] or []:
            if name not in ("nms", "roi_align"):
                raise self.error(f"ops must be among nms, roi_align; got {name}", kind=2)
        texts = [f"detection/nms.mask<{t}>" for t in request["dtypes"] or ["float", "half"]]
        return {"specializations": [{"text": t, "operator": "nms"} for t in texts]}

    def _compile(self, request: dict[str, Any]) -> dict[str, Any]:
        text, arch = request["specialization"]["text"], request["target"]
        status = "hit" if (text, arch) in self.compiled else "compiled"
        self.compiled.add((text, arch))
        return {
            "specialization": text,
            "arch": arch,
            "status": status,
            "milliseconds": 40.0,
            "registers": 32,
            "bytes": 5000,
        }


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(_native, "control", fake.control)
    monkeypatch.setattr(_native, "version", lambda: VERSION)
    monkeypatch.setattr(_native, "load_operators", lambda: None)
    return fake


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Runs a command in this process, on whatever engine is there."""
    return lambda *args, **kwargs: CliRunner().invoke(cli, args, **kwargs)


@pytest.fixture
def run(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the real command in a process of its own, on an empty cache."""

    def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "torchkiln_cli.main", *args],
            env={**os.environ, "TORCHKILN_CACHE_DIR": str(tmp_path / "cache"), **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
