"""Which workloads launch the kernels that a manifest names."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchkiln_cli import _native
from torchkiln_cli._output import Progress, first_line, pairs_text
from torchkiln_cli.warm import UsageError

if TYPE_CHECKING:
    import torch

    from torchkiln import testing

_DTYPES = {"float": "float32", "half": "float16", "bfloat16": "bfloat16", "double": "float64"}


@dataclass(frozen=True)
class Program:
    """A kernel without its tunables: what a problem needs, however fast it runs."""

    path: str
    entry: str
    statics: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        statics = pairs_text(dict(self.statics))
        return f"{self.path.removesuffix('.cuh')}.{self.entry}<{statics}>"


# Declarations of kernels, by path and entry.
Kernels = Mapping[tuple[str, str], Mapping[str, Any]]
# A run, and its directions that are meant.
Step = tuple["testing.Run", frozenset[str]]


class Wanted:
    """The programs of manifests: they choose operators, dtypes and layer constants.

    Attributes:
        unknown: sentences about kernels that this version does not have, by their text.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        kernels = _native.control("kernels")["kernels"]
        self._kernels: Kernels = {(k["path"], k["entry"]): k for k in kernels}
        programs, self.unknown = _read(paths, self._kernels)
        self._programs = frozenset(programs)

    def runs(self) -> list[testing.Run]:
        """Workloads of the operators and dtypes that are named, with the constants as sizes."""
        from torchkiln import testing

        found: dict[tuple[Any, ...], testing.Run] = {}
        for parity in testing.find().values():
            names = {parity.op, *parity.functions}
            programs = [p for p in self._programs if names & self._operators(p)]
            types = {_DTYPES.get(value) for p in programs for _, value in p.statics}
            dtypes = [d for d in parity.dtypes if str(d).removeprefix("torch.") in types]
            known = {name for workload in parity.workloads for name in workload.sizes}
            for constants in map(self._constants, programs):
                sizes = {name: value for name, value in constants.items() if name in known}
                for run in testing.runs([parity], dtypes or None, sizes):
                    found.setdefault((str(run), *run.sizes.items()), run)
        return list(found.values())

    def _operators(self, program: Program) -> set[str]:
        return set(self._kernels[program.path, program.entry]["operators"])

    def _constants(self, program: Program) -> dict[str, int]:
        """The layer constants that are compiled in; 0 stands for any value."""
        parameters = self._kernels[program.path, program.entry]["parameters"]
        names = {p["name"] for p in parameters if p["constant"]}
        return {name: value for name, value in program.statics if name in names and value != 0}

    def choose(
        self, runs: Sequence[testing.Run], device: torch.device, failures: dict[str, str]
    ) -> tuple[list[Step], list[str]]:
        """Runs everything once without tuning, to see what it launches.

        Chosen is what launches programs of the manifest only; then, for a program that none of it
        launches, whatever launches it among others.

        Args:
            runs: workloads.
            device: a GPU.
            failures: gets a sentence for each run that fails.

        Returns:
            Runs with their chosen directions, and the programs that nothing launches.
        """
        launched = self._look(runs, device, failures)
        exact = {key for key, found in launched.items() if found and found <= self._programs}
        missing = self._programs.difference(*(launched[key] for key in exact))
        chosen = exact | {key for key, found in launched.items() if found & missing}
        unreached = self._programs.difference(*launched.values())
        directions = [frozenset(d for j, d in chosen if j == i) for i in range(len(runs))]
        steps = [(run, which) for run, which in zip(runs, directions, strict=True) if which]
        return steps, sorted(map(str, unreached))

    def _look(
        self, runs: Sequence[testing.Run], device: torch.device, failures: dict[str, str]
    ) -> dict[tuple[int, str], frozenset[Program]]:
        """The programs that each run launches, by its place and direction."""
        import torchkiln

        launched: dict[tuple[int, str], frozenset[Program]] = {}
        with (
            Progress("look", len(runs)) as progress,
            torchkiln.tuning.mode("off"),
            tempfile.TemporaryDirectory(prefix="torchkiln-tune-") as folder,
        ):
            for i, run in enumerate(runs):
                try:
                    for direction, call in run.calls(device).items():
                        file = Path(folder) / f"{i}.{direction}.json"
                        with torchkiln.record(file):
                            call()
                        found = _read([str(file)], self._kernels)[0] if file.exists() else []
                        launched[i, direction] = frozenset(found)
                except Exception as error:  # the other runs may still work
                    failures[str(run)] = first_line(error)
                progress.advance(str(run))
        return launched


def _read(paths: Sequence[str], kernels: Kernels) -> tuple[list[Program], dict[str, str]]:
    """The programs of manifests, and a sentence for each kernel that this version does not have."""
    try:
        reply = _native.control("manifest.expand", paths=list(paths))
    except _native.ControlError as error:
        if error.is_usage:
            raise UsageError(f"--{error}") from error
        raise
    programs = []
    for item in reply["specializations"]:
        parameters = kernels[item["path"], item["entry"]]["parameters"]
        statics = tuple(
            (argument["name"], argument["value"])
            for argument, parameter in zip(item["arguments"], parameters, strict=True)
            if not parameter["tunable"]
        )
        programs.append(Program(item["path"], item["entry"], statics))
    return programs, {row["text"]: row["error"] for row in reply["unknown"]}
