"""Every command on a fake engine: output, exit codes, bad input."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import types

import pytest

from torchkiln_cli import _output


def test_warm_json_has_exactly_the_promised_fields(engine, invoke):
    result = invoke("warm", "--ops", "nms", "--dtypes", "float", "--arch", "sm_80,sm_90", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "complete": True,
        "kernels": [
            {
                "specialization": "detection/nms.mask<float>",
                "arch": arch,
                "status": "compiled",
                "milliseconds": 40.0,
            }
            for arch in ("sm_80", "sm_90")
        ],
    }


def test_warm_says_how_it_went(engine, invoke):
    result = invoke("warm", "--all", "--arch", "sm_90")
    assert result.stdout.startswith("2 kernels: 2 compiled, 0 in the cache already, 0 failed (")


def test_warm_leaves_out_architectures_that_a_kernel_cannot_run_on(engine, invoke):
    specialization = {"text": "a", "operator": "nms", "min_architecture": 90}
    engine.replies["expand"] = {"specializations": [specialization]}
    result = invoke("warm", "--all", "--arch", "sm_80,sm_90", "--json")
    assert [row["arch"] for row in json.loads(result.stdout)["kernels"]] == ["sm_90"]


def test_warm_reports_a_failed_compile(engine, invoke):
    engine.replies["compile"] = engine.error("no room")
    result = invoke("warm", "--ops", "nms", "--dtypes", "float", "--arch", "sm_90", "--json")
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["kernels"]
    assert row["status"] == "failed"
    assert row["error"] == "no room"


def test_warm_prints_a_sentence_once(engine, invoke):
    engine.replies["compile"] = engine.error("no compiler")
    result = invoke("warm", "--ops", "nms", "--dtypes", "float", "--arch", "sm_80,sm_90")
    assert result.stderr == "detection/nms.mask<float>@sm_80 and 1 more: no compiler\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--ops", "nms", "--arch", "sm_12"),
            "must be among sm_75, sm_80, sm_90, sm_120; got sm_12",
        ),
        (("--ops", "nms", "--arch", "sm_90a"), "got sm_90a"),
        (("--ops", "nms", "--arch", ","), "--arch must name at least one architecture"),
        (("--ops", "nmms", "--arch", "sm_90"), "--ops must be among nms, roi_align; got nmms"),
        (("--arch", "sm_90"), "Give one of --manifest, --ops and --all"),
        (("--ops", "nms", "--all", "--arch", "sm_90"), "Give one of --manifest, --ops and --all"),
        (("--ops", "nms"), "Missing option '--arch'"),
        (("--ops", "nms", "--arch", "sm_90", "--jobs", "0"), "--jobs"),
    ],
)
def test_warm_rejects(engine, invoke, arguments, sentence):
    result = invoke("warm", *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_warm_without_nvrtc_still_confirms_what_is_cached(engine, invoke):
    engine.replies["nvrtc"] = engine.error("no NVRTC", kind=5)
    engine.compiled.add(("detection/nms.mask<float>", "sm_90"))
    result = invoke("warm", "--ops", "nms", "--dtypes", "float", "--arch", "sm_90", "--json")
    assert json.loads(result.stdout)["kernels"][0]["status"] == "hit"
    assert invoke("warm", "--ops", "nms", "--arch", "90").exit_code == 2


def test_warm_keeps_what_was_done_before_an_interrupt(engine, invoke):
    compile_it = engine.replies["compile"]
    ended = threading.Event()

    def compile_until_interrupted(request):
        if engine.compiled:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            ended.wait(0.2)  # the others are cancelled while this one is in flight
        return compile_it(request)

    engine.replies["compile"] = compile_until_interrupted
    before = signal.getsignal(signal.SIGINT)
    result = invoke("warm", "--all", "--arch", "sm_80,sm_90,sm_120", "--jobs", "1")
    assert signal.getsignal(signal.SIGINT) is before
    assert result.exit_code == 1
    assert "6 kernels: 2 compiled" in result.stdout
    assert "Interrupted with 4 to go" in result.stdout
    assert "the same command goes on from there" in result.stdout


# Ctrl-C at random lines of the standard library's executor, in runs of kernels that take no time.
INTERRUPTED_RUNS = """
import concurrent.futures.thread, random, signal, sys, threading
from torchkiln_cli import warm

warm._compile = lambda name, arch, own_compiler: warm.Row(name, name, arch, "compiled", 0.0)
files = {threading.__file__, concurrent.futures._base.__file__, concurrent.futures.thread.__file__}
work = [("kernel", "sm_90")] * 20

def run(moment):
    '''The outcome, and how many lines of the executor ran, with Ctrl-C before one of them.'''
    lines = 0
    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line"
        if lines == moment and event == "line":
            signal.raise_signal(signal.SIGINT)
        return trace
    sys.settrace(lambda frame, *_: trace if frame.f_code.co_filename in files else None)
    outcome = warm.compile_work(work, jobs=2)
    sys.settrace(None)
    return outcome, lines

_, lines = run(moment=-1)
random = random.Random(0)
interrupted = 0
for _ in range(int(sys.argv[1])):
    outcome, _ = run(moment=random.randrange(lines))
    assert outcome.interrupted or outcome.complete, outcome
    assert threading.active_count() == 1
    interrupted += outcome.interrupted
assert interrupted
"""


def test_interrupts_at_any_moment_leave_no_lock_behind():
    subprocess.run(
        [sys.executable, "-c", INTERRUPTED_RUNS, "300"],
        check=True,
        timeout=60,
        preexec_fn=_interruptible,
    )


def test_the_second_interrupt_ends_at_once():
    program = (
        "import time\n"
        "from torchkiln_cli import warm\n"
        "def compile_it(*_):\n"
        "    print('compiling', flush=True)\n"
        "    time.sleep(600)\n"
        "warm._compile = compile_it\n"
        "warm.compile_work([('', '')] * 2, jobs=1)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, preexec_fn=_interruptible
    )
    assert process.stdout.readline() == b"compiling\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)  # the compile in flight is worth keeping
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT


def _interruptible():
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_progress_is_silent_for_a_second_then_counts(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(_output.time, "monotonic", lambda: now[0])
    with _output.Progress("warm", 9) as progress:
        for seconds in (0.5, 1.5, 2.0, 6.6):
            now[0] = seconds
            progress.advance(f"kernel at {seconds}")
    assert capsys.readouterr().err == "warm: 2 of 9, kernel at 1.5\nwarm: 4 of 9, kernel at 6.6\n"


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    class Terminal:
        written = ""
        encoding = "utf-8"

        def write(self, text):
            self.written += text
            return len(text)

        def flush(self):
            pass

        def isatty(self):
            return True

    now = [0.0]
    monkeypatch.setattr(_output.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with _output.Progress("warm", 2) as progress:
        progress.advance("first")
        now[0] = 2.0
        progress.advance("second")
    assert "2/2" in sys.stderr.written
    assert "second" in sys.stderr.written
    assert "first" not in sys.stderr.written


def test_cache_stat(engine, invoke):
    assert json.loads(invoke("cache", "stat", "--json").stdout)["entries"] == 2
    assert "4.0 KiB" in invoke("cache", "stat").stdout


def test_cache_list_has_the_last_used_first(engine, invoke):
    entries = json.loads(invoke("cache", "list", "--json").stdout)["entries"]
    assert [entry["used"] for entry in entries] == [2, 1]
    text = invoke("cache", "list").stdout
    assert "2 kernels" in text
    assert "detection/nms.mask<float>" in text


def test_cache_clear_asks(engine, invoke):
    refused = invoke("cache", "clear", input="n\n")
    assert refused.exit_code == 1
    assert "Remove 2 compiled kernels?" in refused.stderr
    assert "Freed" not in refused.stdout
    assert "Freed 8.0 KiB." in invoke("cache", "clear", input="y\n").stdout
    assert json.loads(invoke("cache", "clear", "--yes", "--json").stdout) == {"freed_bytes": 8192}


def test_an_error_of_the_engine_is_one_sentence(engine, invoke):
    engine.replies["cache.stat"] = engine.error("the cache is on fire")
    result = invoke("cache", "stat")
    assert result.exit_code == 1
    assert result.stderr == "Error: the cache is on fire\n"


@dataclasses.dataclass
class _Result:
    op: str = "nms"
    case: str = "typical"
    dtype: str = "float32"
    direction: str = "forward"
    error: float = 1e-6
    limit: float = 1e-5
    ok: bool = True
    message: str = ""
    label: str = ""


@pytest.fixture
def testing_module(monkeypatch):
    """Stands in for torchkiln.testing."""
    module = types.SimpleNamespace(results=[_Result()], asked=None)

    def verify(ops, device, dtypes):
        module.asked = (ops, device, dtypes)
        if ops == ["nmms"]:
            raise ValueError("ops must be among nms; got nmms")
        return module.results

    module.verify = verify
    monkeypatch.setitem(sys.modules, "torchkiln", types.SimpleNamespace(testing=module))
    return module


def test_verify_passes(engine, invoke, testing_module):
    result = invoke("verify", "--ops", "nms", "--dtypes", "float32")
    assert result.exit_code == 0
    assert "1 checks on cpu, 0 failed." in result.stdout
    assert testing_module.asked == (["nms"], "cpu", ["float32"])


def test_verify_fails(engine, invoke, testing_module):
    testing_module.results.append(_Result(case="ties", ok=False, message="rows differ"))
    result = invoke("verify")
    assert result.exit_code == 1
    assert "nms ties float32 forward: rows differ" in result.stderr
    parsed = json.loads(invoke("verify", "--json").stdout)
    assert [row["ok"] for row in parsed["results"]] == [True, False]


def test_verify_gives_variants_a_row_each(engine, invoke, testing_module):
    testing_module.results[:] = [
        _Result(op="scan", label="foh", case="a", error=1e-6),
        _Result(op="scan", label="foh", case="b", error=5e-6),
        _Result(op="scan", label="foh", direction="gradient u", error=2e-6),
        _Result(op="scan", label="poly", ok=False, message="rows differ"),
        _Result(op="scan", label="poly", direction="golden forward", error=9e-6),
    ]
    result = invoke("verify")
    rows = {
        line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()
    }
    assert rows["variant"] == ["dtype", "forward", "u", "forward"]  # under "d" and "golden"
    assert rows["foh"] == ["float32", "5e-01", "2e-01"]
    assert rows["poly"] == ["float32", "FAILED", "9e-01"]
    assert "The case nearest to its limit" not in result.stdout


def test_verify_rejects_an_unknown_operator(engine, invoke, testing_module):
    result = invoke("verify", "--ops", "nmms")
    assert result.exit_code == 2
    assert "ops must be among nms; got nmms" in result.stderr
