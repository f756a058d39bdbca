"""Commands as users run them: processes of their own on the real engine."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

WARM = ("warm", "--ops", "box_iou", "--dtypes", "float32", "--arch", "sm_90", "--json")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["--cmake-dir"],
        ["cache", "stat", "--json"],
        ["bundle", "--help"],
        ["bundle", "merge", "--json", "--out", "{}/b.bundle", "{}/a.bundle"],
        ["bundle", "list", "--json", "{}/a.bundle"],
        ["bundle", "verify", "--json", "{}/a.bundle"],
        ["doctor", "--help"],
        ["explain", "--help"],
        ["tune", "--help"],
    ],
    ids=" ".join,
)
def test_commands_without_operators_import_little(arguments, tmp_path, record_property):
    # An empty bundle is a whole one: merging nothing makes it.
    from torchkiln_cli import _native

    _native.control("bundle.merge", out=str(tmp_path / "a.bundle"), inputs=[])
    arguments = [argument.format(tmp_path) for argument in arguments]
    program = (
        "import sys\n"
        "from torchkiln_cli.main import cli\n"
        "try:\n"
        f"    cli({arguments!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert not {'torch', 'torchkiln', 'rich', 'numpy'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "TORCHKILN_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    # For the reader: time on the processor, which other processes do not change much.
    milliseconds = 1e3 * (used.ru_utime + used.ru_stime)
    record_property("summary", f"torchkiln {' '.join(arguments)}: {milliseconds:.0f} ms")


def test_the_operators_use_the_same_engine():
    program = (
        "import sys\n"
        "from torchkiln_cli import _native\n"
        "_native.version()\n"
        "mine = sys.modules['torchkiln._control']\n"
        "_native.load_operators()\n"
        "from torchkiln import _control\n"
        "assert _control is mine\n"
        "assert _native.control('kernels')['kernels']\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_module_and_command_are_the_same(run):
    command = subprocess.run(
        [sys.executable, "-m", "torchkiln", "--version"], capture_output=True, text=True, check=True
    )
    assert command.stdout == run("--version").stdout
    assert command.stdout.startswith("torchkiln ")


def test_warm_compiles_once_and_the_cache_shows_it(run):
    first = json.loads(run(*WARM).stdout)["kernels"]
    assert {row["status"] for row in first} == {"compiled"}
    assert {row["arch"] for row in first} == {"sm_90"}
    second = json.loads(run(*WARM).stdout)["kernels"]
    assert {row["status"] for row in second} == {"hit"}
    assert [r["specialization"] for r in first] == [r["specialization"] for r in second]

    assert json.loads(run("cache", "stat", "--json").stdout)["entries"] == len(first)
    entries = json.loads(run("cache", "list", "--json").stdout)["entries"]
    assert {e["specialization"] for e in entries} == {r["specialization"] for r in first}
    assert run("cache", "list").returncode == 0

    assert json.loads(run("cache", "clear", "--yes", "--json").stdout)["freed_bytes"] > 0
    assert json.loads(run("cache", "stat", "--json").stdout)["entries"] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ops", "boxiou", "--arch", "sm_90"), "ops must be among"),
        (("--ops", "box_iou", "--dtypes", "int3", "--arch", "sm_90"), "dtypes must be among"),
        (("--ops", "box_iou", "--arch", "sm_1"), "--arch must be among sm_"),
    ],
)
def test_warm_lists_what_is_known(run, arguments, sentence):
    result = run("warm", *arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_interrupt_keeps_what_is_compiled(tmp_path):
    cache = tmp_path / "cache"
    every = "sm_75,sm_80,sm_86,sm_89,sm_90,sm_100,sm_120"
    process = subprocess.Popen(
        [sys.executable, "-m", "torchkiln_cli.main", "warm", "--all", "--arch", every, "--jobs=1"],
        env={**os.environ, "TORCHKILN_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while process.poll() is None and not _objects(cache):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Interrupted with" in output
    assert _objects(cache)


def _objects(cache):
    return [f for f in cache.rglob("*") if f.is_file() and f.stat().st_size > 1024]


def test_verify_runs_the_parity_suite(run):
    result = run("verify", "--ops", "box_iou", "--dtypes", "float32", "--json")
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)["results"]
    assert results
    assert all(row["ok"] for row in results)


def test_tune_needs_a_gpu(run):
    result = run("tune", "--ops", "nms", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 2
    assert "--device must be a GPU of this machine; torch sees none" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.gpu
def test_tune_measures_once(run):
    arguments = ("tune", "--ops", "box_iou", "--dtypes", "float32", "--sizes", "n=300,m=50")
    first = run(*arguments, "--json")
    assert first.returncode == 0, first.stderr
    reply = json.loads(first.stdout)
    assert {row["kernel"].partition("<")[0] for row in reply["tuned"]} == {
        "detection/box_iou.forward",
        "detection/box_iou.backward",
    }
    assert reply["gpu_ms"] > 0
    again = json.loads(run(*arguments, "--json").stdout)
    assert again["complete"]
    assert again["tuned"] == []
    found = json.loads(run("doctor", "--json").stdout)["findings"]
    (records,) = (f for f in found if f["name"] == "tuning records of GPU kind 1")
    assert records["status"] == "ok", records
    assert "of no GPU" not in records["fact"]
