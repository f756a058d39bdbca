"""What commands share: JSON, tables, sizes, progress. rich is imported when something is drawn."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import rich.progress

_SILENT_SECONDS = 1.0
_HEARTBEAT_SECONDS = 5.0


def emit_json(data: Any) -> None:
    """Prints data for programs."""
    click.echo(json.dumps(data, indent=2))


def emit_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table; columns whose name ends in a blank are aligned to the right."""
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(
            column.strip(), justify="right" if column.endswith(" ") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(rich.text.Text, row))
    # Through a pipe there is no width to keep to, and cut lines help nobody.
    width = None if sys.stdout.isatty() else 160
    rich.console.Console(width=width).print(table)


def size_text(size: int) -> str:
    """A number of bytes for people."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def pairs_text(values: Mapping[str, Any]) -> str:
    """Names and values as in the texts of kernels: "lanes=8, classes=true"."""
    return ", ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in values.items()
    )


def first_line(error: Exception) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Progress:
    """Counts up to a total on stderr, silently for a second.

    A bar on a terminal, elsewhere a line now and then.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._start = time.monotonic()
        self._next_line = self._start + _SILENT_SECONDS
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, name: str) -> None:
        """One more is done, and this was its name."""
        self._done += 1
        self.show(name)

    def show(self, name: str) -> None:
        """Says what is being done, or was done last."""
        now = time.monotonic()
        if sys.stderr.isatty():
            if self._bar is None and now - self._start >= _SILENT_SECONDS:
                self._start_bar()
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=self._done, name=name)
        elif now >= self._next_line:
            click.echo(f"{self._what}: {self._done} of {self._total}, {name}", err=True)
            self._next_line = now + _HEARTBEAT_SECONDS

    def _start_bar(self) -> None:
        import rich.console
        import rich.progress

        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.fields[name]}", markup=False),
            console=rich.console.Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._what, total=self._total, name="")
        self._bar.start()
