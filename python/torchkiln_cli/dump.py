"""`torchkiln dump`: source, PTX, machine code and its disassembly, as files."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from torchkiln_cli import _native
from torchkiln_cli._output import emit_json

KINDS = ("source", "ptx", "cubin", "sass")
# The arguments with which each tool prints the code of a cubin.
_DISASSEMBLERS = {"nvdisasm": ("--print-code",), "cuobjdump": ("--dump-sass",)}
_USUAL_TOOLKIT = "/usr/local/cuda"
_NONE = (
    "No SASS: neither nvdisasm nor cuobjdump was found on the PATH, in CUDA_HOME or among Python's "
    "packages. pip install nvidia-cuda-nvdisasm brings one."
)


def run(
    rows: Sequence[dict[str, Any]], target: str, folder: str, what: Sequence[str], as_json: bool
) -> bool:
    """Writes what is asked for; False when a disassembly was asked for and no tool was found."""
    tool = find_disassembler() if "sass" in what else None
    parts = sorted(set(what) - {"sass"} | ({"cubin"} if tool else set()))
    dumps = []
    for row in rows:
        reply = _native.control(
            "dump",
            specialization=row["specialization"],
            target=target,
            folder=os.path.abspath(folder),
            what=parts,
        )
        if tool is not None:
            reply["files"]["sass"] = disassemble(tool, Path(reply["files"]["cubin"]))
        dumps.append(reply)
    complete = tool is not None or "sass" not in what
    if as_json:
        emit_json({"dumps": dumps, "disassembler": tool, "complete": complete})
    else:
        for reply in dumps:
            names = ", ".join(Path(path).name for path in reply["files"].values())
            click.echo(f"{reply['text']}@{reply['target']}\n  {reply['folder']}: {names}")
        if not complete:
            click.echo(_NONE, err=True)
    return complete


def find_disassembler() -> str | None:
    """Path of a tool that prints the instructions of a cubin: PATH, CUDA_HOME, Python packages."""
    toolkits = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(t) / "bin" for t in (*toolkits, _USUAL_TOOLKIT) if t]
    for site in sys.path:
        if site.endswith(("site-packages", "dist-packages")):
            folders += sorted(Path(site).glob("nvidia/cu*/bin"), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, folders)])
    found = (shutil.which(name, path=path) for name in _DISASSEMBLERS)
    return next((tool for tool in found if tool), None)


def disassemble(tool: str, cubin: Path) -> str:
    """Writes the instructions beside a cubin and returns the path."""
    done = subprocess.run(
        [tool, *_DISASSEMBLERS[Path(tool).name], str(cubin)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise click.ClickException(f"{tool} failed on {cubin}: {last}")
    sass = cubin.with_suffix(".sass")
    sass.write_text(done.stdout, encoding="utf-8")
    return str(sass)
