"""`torchkiln compat mmcv --check`: what of a peer is there."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import click

from torchkiln_cli._output import emit_json, emit_table

__all__ = ["run"]


def run(*, as_json: bool, as_markdown: bool) -> bool:
    """Prints the coverage of `mmcv.ops`; returns whether every name is what the table says."""
    from torchkiln.compat.mmcv import _coverage

    rows, problems = _coverage.rows(), _coverage.problems()
    if as_markdown:
        click.echo(_coverage.markdown(), nl=False)
    elif as_json:
        emit_json({"names": rows, "problems": problems})
    else:
        working = sum(row["state"] != _coverage.MISSING for row in rows)
        columns = ("name", "module", "kind", "registry", "state")
        emit_table("mmcv.ops", columns, ([row[column] for column in columns] for row in rows))
        click.echo(f"{working} of {len(rows)} names work; all import.")
    for sentence in problems:
        click.echo(sentence, err=True)
    return not problems
