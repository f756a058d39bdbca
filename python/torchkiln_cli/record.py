"""`torchkiln record -- program`: runs a program and writes down the kernels that it uses."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

import click

from torchkiln_cli._output import emit_json


def run(out: str, program: Sequence[str], as_json: bool) -> int:
    """Runs the program with recording on; returns its exit code."""
    path = os.path.abspath(out)
    before = _kernels(path)
    # With --json our stdout is one document: the program's goes elsewhere.
    stdout = sys.stderr if as_json else None
    code = _run(program, {**os.environ, "TORCHKILN_RECORD": path}, stdout)
    kernels = _kernels(path)
    if as_json:
        emit_json({"manifest": path, "exit_code": code, "kernels": sorted(kernels)})
    else:
        click.echo(
            f"{path}: {len(kernels)} kernels, {len(kernels - before)} of them new."
            if kernels
            else f"The program launched no CUDA kernel of torchkiln; {path} was not written.",
            err=True,
        )
    return code


def _run(program: Sequence[str], environment: dict[str, str], stdout: IO[str] | None) -> int:
    try:
        process = subprocess.Popen(program, env=environment, stdout=stdout)
    except OSError as error:
        raise click.ClickException(f"{program[0]} cannot be run: {error.strerror}") from error
    # Ctrl-C reaches the program, too: it decides what to do with it, and we wait.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code  # as shells tell a signal


def _kernels(path: str) -> set[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return set(json.load(file)["kernels"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()
