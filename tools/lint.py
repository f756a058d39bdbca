"""Runs every static check of the repository: formatters, type checker and the rules below.

Prints what is wrong and exits with 1; `--fix` lets ruff and the formatters mend what they can.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPP_SUFFIXES = {".h", ".hpp", ".cpp", ".cuh"}
SPDX_SUFFIXES = CPP_SUFFIXES | {".py", ".cmake", ".sh", ".toml", ".yaml", ".map"}
LIBRARY_FOLDERS = {"cache", "jit", "kernel_templates", "bindings", "include"}

SPDX = "SPDX-License-Identifier: " + "Apache-2.0"
# Folders that exist on one person's machine only.
LOCAL_PATH = re.compile(r"(?<![\w.<>$}~-])/(?:home|root|work|mnt|Users)/\w")
# Library code reports through errors and callbacks; ruff's T20 says the same for Python.
CPP_PRINT = re.compile(r"\bstd::cout\b|(?<!\w)(?:std::)?(?:printf|puts)\s*\(")


def source_files() -> list[Path]:
    """Returns every file that git tracks or would track, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    names = sorted(name for name in listing.stdout.split("\0") if name)
    return [Path(name) for name in names if (ROOT / name).is_file()]


def broken_rules(path: Path, text: str) -> Iterator[str]:
    """Yields one line for each of our own rules that a file breaks."""
    lines = text.splitlines()
    is_source = path.suffix in SPDX_SUFFIXES or path.name in {"CMakeLists.txt", "Makefile"}
    if is_source and lines and not any(SPDX in line for line in lines[:20]):
        yield f"{path}:1: the first lines must hold '{SPDX}'"
    prints = path.suffix in CPP_SUFFIXES and path.parts[0] in LIBRARY_FOLDERS
    for number, line in enumerate(lines, start=1):
        if LOCAL_PATH.search(line):
            yield f"{path}:{number}: absolute path of one machine: {line.strip()}"
        if prints and CPP_PRINT.search(line.split("//")[0]):
            yield f"{path}:{number}: library code must not print: {line.strip()}"


def own_rules_hold(files: list[Path]) -> bool:
    """Checks our own rules over all text files."""
    failures = []
    for path in files:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        failures += broken_rules(path, text)
    print("\n".join(failures) if failures else "own rules: ok")
    return not failures


def succeeds(*command: str) -> bool:
    """Runs a tool of this environment and shows what it says."""
    print("+", " ".join(command[:4]), *(["..."] if len(command) > 4 else []), flush=True)
    tool = Path(sys.executable).parent / command[0]
    return subprocess.run([str(tool), *command[1:]], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """Runs all checks, also after one failed, so that one run tells everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fix", action="store_true", help="format the files first")
    fix = parser.parse_args().fix
    files = source_files()
    cpp = [str(path) for path in files if path.suffix in CPP_SUFFIXES]
    if fix:
        succeeds("ruff", "check", "--fix", "--quiet", ".")
        succeeds("ruff", "format", "--quiet", ".")
        if cpp:
            succeeds("clang-format", "-i", *cpp)
    results = [
        own_rules_hold(files),
        succeeds("ruff", "check", "."),
        succeeds("ruff", "format", "--check", "."),
        not cpp or succeeds("clang-format", "--dry-run", "-Werror", "--ferror-limit=1", *cpp),
        succeeds("mypy"),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
