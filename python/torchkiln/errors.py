"""Exceptions of torchkiln, and the translation of an operator's plain RuntimeError into them.

A failed check or compile leaves a record of kind, argument and text on its thread; what reaches
Python is a RuntimeError around that text, whatever was thrown.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

__all__ = [
    "CaptureError",
    "CompilerNotFoundError",
    "DriverError",
    "KernelCompileError",
    "MissingKernelError",
    "TorchkilnError",
    "from_record",
    "translate",
]


class TorchkilnError(RuntimeError):
    """Base of the errors that are neither TypeError, ValueError nor IndexError.

    Args:
        message: what the user reads.
        details: everything the engine recorded.
    """

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details = dict(details or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.details)

    @property
    def specialization(self) -> str:
        """The kernel in question, such as `detection/box_iou.forward<float, mode=0>@sm_90`."""
        return cast("str", self.details.get("specialization", ""))


class KernelCompileError(TorchkilnError):
    """NVRTC refused a kernel."""

    @property
    def log(self) -> str:
        """The compiler's whole log."""
        return cast("str", self.details.get("log", ""))

    @property
    def excerpt(self) -> str:
        """Numbered source lines around the first error."""
        return cast("str", self.details.get("excerpt", ""))

    @property
    def options(self) -> list[str]:
        """The compiler's options."""
        return cast("list[str]", self.details.get("options", []))

    @property
    def source_path(self) -> str:
        """Where the source was kept, or an empty string."""
        return cast("str", self.details.get("source_path", ""))


class CompilerNotFoundError(TorchkilnError):
    """A kernel must be compiled and NVRTC cannot be found."""


class DriverError(TorchkilnError):
    """The CUDA driver is missing or refused a call."""


class CaptureError(TorchkilnError):
    """The call would break the CUDA graph capture that is under way."""


class MissingKernelError(TorchkilnError):
    """A kernel is in no bundle and not in the cache, and compiling is forbidden."""

    @property
    def nearest(self) -> str | None:
        """The kernel that comes closest among those that are there."""
        return cast("str | None", self.details.get("nearest"))

    @property
    def differences(self) -> list[str]:
        """In what `nearest` differs from the one that is missing."""
        return cast("list[str]", self.details.get("differences", []))

    @property
    def command(self) -> str:
        """The shell command that adds the kernel, where there is a compiler."""
        return cast("str", self.details.get("command", ""))


_PLAIN: dict[int, type[Exception]] = {1: TypeError, 2: ValueError, 3: IndexError}
_DETAILED: dict[int, type[TorchkilnError]] = {
    4: KernelCompileError,
    5: CompilerNotFoundError,
    6: DriverError,
    7: CaptureError,
    9: MissingKernelError,
}
# How torch's argument parser words a wrong Python type, and what it calls the right ones.
_WRONG_PYTHON_TYPE = re.compile(
    r"::(?P<op>\w+)\(\) Expected a value of type "
    r"'(?:Optional\[)?(?P<many>List)?\W?(?P<kind>\w+)\W*' for argument '(?P<argument>\w+)' "
    r"but instead found type '(?P<found>.+?)'(?:.*\nPosition: .*\nValue: (?P<value>.{1,60})$)?",
    re.MULTILINE,
)
_PYTHON_TYPES = {"int": "integer", "float": "number", "bool": "bool", "Tensor": "tensor"}
_NUMBERS = ("int", "float", "complex")


def _last_record() -> dict[str, Any]:
    from torchkiln import _control

    return _control.last_error()


def from_record(record: Mapping[str, Any]) -> Exception:
    """Returns the exception for a failure of the engine; RuntimeError for its own bugs."""
    kind, message = record["kind"], record["message"]
    if kind in _DETAILED:
        return _DETAILED[kind](message, record.get("details"))
    return _PLAIN.get(kind, RuntimeError)(message)


def translate(
    error: RuntimeError, last_record: Callable[[], dict[str, Any]] = _last_record
) -> Exception:
    """Returns the exception that the user should see for what an operator raised.

    Args:
        error: as it left the operator.
        last_record: reads the last failure of this thread. It may be older than `error`, so it only
            counts when its text is part of the error's; torch adds text before and after.

    Returns:
        `error` itself when nothing better is known.
    """
    text = str(error)
    record = last_record()
    message = record.get("message", "")
    if message and message in text:
        if record["kind"] in (*_PLAIN, *_DETAILED):
            return from_record(record)
    elif match := _WRONG_PYTHON_TYPE.search(text):
        return TypeError(_wrong_type(**match.groupdict()))
    return error


def _wrong_type(
    op: str, many: str | None, kind: str, argument: str, found: str, value: str | None
) -> str:
    """The sentence for an argument of another Python type, or a number of more bits."""
    word = _PYTHON_TYPES.get(kind, kind)
    rule = f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
    if many:
        rule = f"a list of {word}s"
    elif found == "int" and kind in _NUMBERS:
        rule += " of 64 bits"
    got = value if value and found in _NUMBERS else found.replace("NoneType", "None")
    return f"{op}: {argument} must be {rule}; got {got}"
