"""Measures a warm look-up: one small kernel found on the disk and checked, and nothing opened.

Prints one JSON object. Each run is a new process of the torch-free core, which looks the kernel up
many times; its memory layer is left out. The best run counts, because other work of the machine can
only add to it.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import attack


def measure(runs: int, rounds: int) -> dict[str, Any]:
    """Returns the median and 90th percentile, in microseconds, of the best of some runs."""
    with tempfile.TemporaryDirectory(prefix="torchkiln-lookup-") as folder:
        work = Path(folder)
        command = attack.worker("lookup", root=work / "root", work=work, rounds=rounds)
        replies = [attack.run(command, work) for _ in range(runs)]
    best = min(replies, key=lambda reply: reply["microseconds"]["median"])
    names = ("microseconds", "payload_bytes", "libnvrtc_opened", "libcuda_opened")
    return {**{name: best[name] for name in names}, "runs": runs, "rounds": rounds}


@click.command(help=__doc__)
@click.option("--runs", default=5, show_default=True)
@click.option("--rounds", default=5000, show_default=True)
def main(runs: int, rounds: int) -> None:
    """Prints the measurement."""
    click.echo(json.dumps(measure(runs, rounds), indent=2))


if __name__ == "__main__":
    main()
