"""Ctrl-C as a note, for work that an exception must not end in the middle."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def noted(note: Callable[[], object]) -> Iterator[None]:
    """Calls `note` at the first Ctrl-C; the second one ends the process at once.

    KeyboardInterrupt is raised between any two instructions, also where the standard library holds
    a lock: whoever waits for that lock then waits forever. `note` runs between any two instructions
    too, so it may only do what is reentrant, such as `queue.SimpleQueue.put`.
    """
    before = signal.getsignal(signal.SIGINT)
    # Another thread is never interrupted, and who ignores Ctrl-C or lets it kill means that.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        note()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
