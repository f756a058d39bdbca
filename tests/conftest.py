"""Fixtures, markers and options that every test folder shares."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import itertools
import os
import re
import tempfile

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, max_examples=20
)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Test processes run beside each other; tests about threads ask for their own number.
torch.set_num_threads(1)

# Marker, and why a test that has it is skipped unless the option of the same name is given.
ASKED_FOR = {
    "exhaustive": "tries every case instead of a sample",
    "large": "needs many gigabytes of memory",
    "network": "needs a network",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torchkiln")
    for marker, reason in ASKED_FOR.items():
        group.addoption(f"--{marker}", action="store_true", help=f"run what {reason}")
    group.addoption(
        "--coverage-ops", action="store_true", help="list operators that no suite tests, and stop"
    )


def pytest_configure(config: pytest.Config) -> None:
    """One cache for the run and its workers: the user's own is neither read nor written."""
    if "TORCHKILN_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="torchkiln-tests-")
        os.environ["TORCHKILN_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, reason in ASKED_FOR.items():
        if not (
            config.getoption(f"--{marker}") or marker in re.findall(r"\w+", config.option.markexpr)
        ):
            skip(items, marker, f"{reason}; pass --{marker} or -m {marker}")
    if not torch.cuda.is_available():
        skip(items, "gpu", "needs a CUDA device")


def skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--coverage-ops"):
        list_untested_operators(session)


def list_untested_operators(session: pytest.Session) -> None:
    from torchkiln import ops

    suites = {getattr(item, "cls", None) for item in session.items}
    parities = [suite.parity for suite in suites if getattr(suite, "parity", None)]
    tested = {name for parity in parities for name in parity.functions}
    public = {name for name in vars(ops) if callable(getattr(ops, name))}
    missing = sorted(public - tested)
    text = "\n".join(missing) or f"each of the {len(public)} operators has a suite"
    pytest.exit(f"operators without a suite:\n{text}" if missing else text, int(bool(missing)))


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how near to its limit each suite came, and the lines that tests want to have read."""
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for key, ratio in report.user_properties:
            if key.startswith(("forward", "gradient")):
                place = (report.nodeid.split("::")[1], key.split()[0])
                worst[place] = max(worst.get(place, (0.0, "")), (ratio, report.nodeid))
    lines = [
        (report.nodeid, text)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for key, text in report.user_properties
        if key == "summary"
    ]
    for nodeid, group in itertools.groupby(lines, key=lambda line: line[0]):
        terminalreporter.section(nodeid.rpartition("::")[2])
        for _, text in group:
            terminalreporter.line(text)
    if worst:
        terminalreporter.section("worst ratio of error to limit")
    for (suite, direction), (ratio, nodeid) in sorted(worst.items()):
        case = nodeid.partition("[")[2].rstrip("]")
        terminalreporter.line(f"{ratio:.2f} {suite} {direction} {case}")
