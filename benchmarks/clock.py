"""What a GPU's clock and temperature were while something was measured, where that can be asked."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

PERIOD_MS = 50
QUERY = "clocks.sm,temperature.gpu,power.draw"


@dataclass(frozen=True)
class Reading:
    """One look at the GPU."""

    at: float  # time.monotonic()
    mhz: float
    celsius: float
    watts: float


class ClockLog:
    """Reads the GPU's state beside the measurement: through pynvml, else through nvidia-smi.

    Without either, `window` returns nothing and no round is dropped for its clock.
    """

    def __init__(self, device: int | None) -> None:
        self.readings: list[Reading] = []
        self.source = "none"
        self._process: subprocess.Popen[str] | None = None
        self._handle: Any = None
        self._nvml: Any = None
        if device is not None:
            uuid = f"GPU-{getattr(torch.cuda.get_device_properties(device), 'uuid', '')}"
            self._open_nvml(uuid) or self._open_smi(uuid)

    def __enter__(self) -> ClockLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process that reads, if there is one."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def look(self) -> None:
        """Takes a reading now, if that is cheap."""
        if self._handle is None:
            return
        try:
            nvml = self._nvml
            self.readings.append(
                Reading(
                    time.monotonic(),
                    float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)),
                    float(nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU)),
                    nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
                )
            )
        except Exception:
            self._handle = None

    def window(self, begin: float, end: float) -> list[Reading]:
        """The readings from `begin` to `end`, or the last one before, if it is not old."""
        readings = list(self.readings)
        inside = [r for r in readings if begin <= r.at <= end]
        return inside or [r for r in readings[-1:] if r.at >= begin - 4 * PERIOD_MS / 1000]

    def _open_nvml(self, uuid: str) -> bool:
        try:
            import pynvml  # type: ignore[import-not-found,unused-ignore]

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml, self.source = pynvml, "pynvml"
            self.look()
        except Exception:
            self._handle = None
        return self._handle is not None

    def _open_smi(self, uuid: str) -> bool:
        command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={QUERY}"]
        command += ["--format=csv,noheader,nounits", f"--loop-ms={PERIOD_MS}"]
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return False
        self.source = "nvidia-smi"
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return True

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            try:
                mhz, celsius, watts = (float(part) for part in line.split(","))
            except ValueError:
                continue
            self.readings.append(Reading(time.monotonic(), mhz, celsius, watts))
