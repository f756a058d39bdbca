"""The driver, the GPUs, and the code that each of them would run."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchkiln_cli import _native
from torchkiln_cli.doctor._finding import Finding, judge

_NO_GPU = "Nothing to do on a machine without a GPU; elsewhere install the NVIDIA driver"
_SMI_SECONDS = 20


def _driver() -> Iterator[Finding]:
    try:
        reply = _native.control("driver")
    except _native.ControlError as error:
        stubs = [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if "stubs" in p]
        fix = f"Take {stubs[0]} out of LD_LIBRARY_PATH" if stubs else _NO_GPU
        # With a kernel module there is a GPU, and somebody wants to use it.
        there = _kernel_module() is not None
        yield Finding("driver", "fail" if there else "warn", str(error), fix)
        return
    yield _driver_version(reply["version"])
    if not reply["devices"]:
        yield Finding("GPU", "warn", "the driver lists none", "Check CUDA_VISIBLE_DEVICES")
        return
    for index, device in enumerate(reply["devices"]):
        yield _device(index, device)
        yield from _sharing(index, device.get("compute_mode", "default"))
    yield from _settings()


def _kernel_module() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else "unknown"


def _driver_version(version: int) -> Finding:
    major, minor = version // 1000, version % 1000 // 10
    module = _kernel_module()
    fact = f"knows CUDA {major}.{minor}" + (f", kernel module {module}" if module else "")
    try:
        nvrtc = _native.control("nvrtc", load=True)["version"]
    except _native.ControlError:
        return Finding("driver", "ok", fact)  # the missing compiler has a line of its own
    good = major >= int(nvrtc.split(".")[0])
    if not good:
        fact += f", older than NVRTC {nvrtc}: its machine code runs, its PTX does not"
    fix = f"Update the driver, or pip install 'nvidia-cuda-nvrtc-cu{major}'"
    return judge("driver", good, fact, fix, bad="warn")


def _device(index: int, device: dict[str, Any]) -> Finding:
    number = 10 * device["major"] + device["minor"]
    ladder = _native.control("ladder", device=index)
    fact = f"{device['name']}, sm_{number}"
    fix = "Install a newer nvidia-cuda-nvrtc, or ship a bundle made for this GPU"
    if not ladder["rungs"]:
        return Finding(f"GPU {index}", "fail", f"{fact}: {ladder['explanation']}", fix)
    rung = ladder["rungs"][0]
    exact = rung["target"] == f"sm_{number}"
    return judge(f"GPU {index}", exact, f"{fact}, runs {rung['reason']}", fix, bad="warn")


def _sharing(index: int, mode: str) -> Iterator[Finding]:
    fix = "sudo nvidia-smi -c DEFAULT"
    if mode == "prohibited":
        yield Finding(
            f"GPU {index}, compute mode", "fail", "prohibited: no program may use it", fix
        )
    elif mode != "default":
        fact = f"{mode}: a second process gets no context"
        yield Finding(f"GPU {index}, compute mode", "warn", fact, fix)


def _settings() -> Iterator[Finding]:
    """What slows a first call or changes what is visible, as far as the machine tells."""
    loading = os.environ.get("CUDA_MODULE_LOADING", "")
    pipe = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    facts = [
        f"CUDA_MODULE_LOADING {loading or 'unset (lazy)'}",
        f"MPS {'on' if (Path(pipe) / 'control').exists() else 'off'}",
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        facts.append(f"CUDA_VISIBLE_DEVICES={visible}")
    persistence = _ask_smi("persistence_mode")
    facts += [f"MIG {mode.lower()}" for mode in _ask_smi("mig.mode.current")[:1]]
    lasting = "Disabled" not in persistence
    facts += [f"persistence {'on' if lasting else 'off'}"] if persistence else []
    fix = "sudo nvidia-smi -pm 1 spares each first process the start of the driver"
    yield judge("GPU settings", lasting, ", ".join(facts), fix, bad="warn")


def _ask_smi(field: str) -> list[str]:
    """One line for each GPU; nothing without nvidia-smi or an answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


CHECKS = (_driver,)
