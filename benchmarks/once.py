"""Runs one side of one row between the profiler's marks, for ncu and nsys.

    ncu --profile-from-start off --set full python -m benchmarks.once --row 'nms | forward | 4000'

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import click
import torch

from benchmarks import cases

WARM_UP_CALLS = 3


@click.command()
@click.option("--row", "text", required=True, help="Part of the row's key; the first match is run.")
@click.option("--side", "name", default=cases.OURS, help="torchkiln, torchvision, PyTorch, ...")
@click.option("--calls", default=1, help="How many calls to profile.")
@click.option("--list", "listing", is_flag=True, help="Only print the keys that match.")
def main(text: str, name: str, calls: int, listing: bool) -> None:
    """Warms a row up, then runs it where a profiler looks."""
    found = [case for case in cases.gpu_cases(quick=False) if text in case.key]
    if listing:
        click.echo("\n".join(case.key for case in found))
        return
    if not found:
        raise click.BadParameter(f"must be part of a row's key; got {text!r}. Try --row '' --list")
    work = found[0].make(torch.device("cuda"))
    sides = {side.name: side for side in work.sides}
    if name not in sides:
        raise click.BadParameter(f"must be among {', '.join(sides)}; got {name}")
    call = sides[name].prepare(work.inputs)
    for _ in range(WARM_UP_CALLS):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    click.echo(f"{found[0].key}: {name}")


if __name__ == "__main__":
    main()
