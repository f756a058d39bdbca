"""Every command with its options. Exit codes: 0 fine, 1 a problem was found, 2 wrong usage.

Only click is imported here; what a command needs is imported when it runs.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from torchkiln_cli.warm import Selection

_F = TypeVar("_F", bound=Callable[..., Any])
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _command(function: _F) -> _F:
    """Turns our errors into one sentence and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        from torchkiln_cli._native import ControlError, EngineMissingError, ModuleError

        try:
            function(*args, **kwargs)
        except ModuleError as error:
            raise click.UsageError(str(error)) from error
        except (ControlError, EngineMissingError) as error:
            raise click.ClickException(str(error)) from error

    return run  # type: ignore[return-value]


def _importing(function: _F) -> _F:
    """Adds --import to a command that looks at declared kernels."""

    @click.option(
        "--import",
        "modules",
        multiple=True,
        metavar="MODULE",
        help="A module or .py file that declares kernels of your own; may be repeated.",
    )
    @functools.wraps(function)
    def run(*args: Any, modules: tuple[str, ...], **kwargs: Any) -> None:
        from torchkiln_cli import _native

        _native.add_imports(modules)
        function(*args, **kwargs)

    return run  # type: ignore[return-value]


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from torchkiln_cli import _native

    click.echo(f"torchkiln {_native.version()}")
    context.exit()


def _cmake_dir(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value or context.resilient_parsing:
        return
    from torchkiln_cli import _native

    try:
        click.echo(_native.cmake_dir())
    except _native.EngineMissingError as error:
        raise click.ClickException(str(error)) from error
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Version."
)
@click.option(
    "--cmake-dir",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_cmake_dir,
    help="Folder for CMake's torchkiln_DIR.",
)
def cli() -> None:
    """CUDA operators for PyTorch, compiled where they run, without nvcc."""


@cli.command()
@click.option("--image", type=click.Path(exists=True, dir_okay=False), help="Your own photograph.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True),
    default="torchkiln_demo.png",
    show_default=True,
    help="The picture to write.",
)
@click.option(
    "--arch",
    default="sm_80,sm_90,sm_100,sm_120",
    show_default=True,
    help="Architectures to compile for.",
)
@_json
@_command
def demo(image: str | None, output: str, arch: str, as_json: bool) -> None:
    """Find faces with a real detector on our kernels, then compile them for other GPUs."""
    from torchkiln_cli import demo as module
    from torchkiln_cli.warm import UsageError, parse_architectures

    try:
        complete = module.run(image, output, parse_architectures(arch), as_json)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    sys.exit(0 if complete else 1)


@cli.command()
@click.option("--report", is_flag=True, help="Print a report to paste, without names of this host.")
@_json
@_command
def doctor(report: bool, as_json: bool) -> None:
    """Check this installation actively; each problem comes with its fix."""
    from torchkiln_cli import doctor as module

    findings = module.examine()
    if as_json:
        module.emit_json(findings)
    else:
        click.echo(module.text(findings, report=report))
    sys.exit(1 if any(f.status == "fail" for f in findings) else 0)


@cli.command()
@click.option("--ops", help="Operators, for example nms,roi_align; all by default.")
@click.option("--device", default="cpu", show_default=True, help="Where to run them: cpu or cuda.")
@click.option("--dtypes", help="For example float32,float16; all by default.")
@_importing
@_json
@_command
def verify(ops: str | None, device: str, dtypes: str | None, as_json: bool) -> None:
    """Check operators against their reference in float64, on this machine."""
    from torchkiln_cli import verify as module
    from torchkiln_cli.warm import split

    try:
        passed = module.run(
            split(ops) if ops else None, device, split(dtypes) if dtypes else None, as_json
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    sys.exit(0 if passed else 1)


def _compiling(function: Callable[..., None]) -> Callable[..., None]:
    """Adds what `warm` and `bundle create` compile: (selection, architectures, jobs)."""

    @functools.wraps(function)
    def parsed(
        *,
        manifests: tuple[str, ...],
        ops: str | None,
        all_ops: bool,
        dtypes: str | None,
        arch: str,
        jobs: int | None,
        **others: Any,
    ) -> None:
        from torchkiln_cli import warm as module

        module.use_jobs(jobs)
        try:
            selection = module.parse_selection(manifests, ops, all_ops, dtypes)
            architectures = module.parse_architectures(arch)
            function(selection=selection, architectures=architectures, jobs=jobs, **others)
        except module.UsageError as error:
            raise click.UsageError(str(error)) from error

    options = [
        click.option(
            "--manifest",
            "manifests",
            multiple=True,
            type=click.Path(exists=True, dir_okay=False),
            help="Kernels that a program used, as `record` wrote them down.",
        ),
        click.option("--ops", help="Generic variants of operators, for example nms,roi_align."),
        click.option("--all", "all_ops", is_flag=True, help="Generic variants of all operators."),
        click.option("--dtypes", help="With --ops, --all: float32,float16; all by default."),
        click.option("--arch", required=True, help="Architectures, for example sm_80,sm_90."),
        click.option(
            "--jobs", type=click.IntRange(min=1), help="Compiles at a time; by cores and memory."
        ),
    ]
    for option in reversed(options):
        parsed = option(parsed)
    return parsed


@cli.command()
@_command
@_importing
@_compiling
@_json
def warm(selection: Selection, architectures: list[str], jobs: int | None, as_json: bool) -> None:
    """Compile kernels into the cache, for GPUs that need not be here."""
    from torchkiln_cli import _output
    from torchkiln_cli import warm as module

    outcome = module.warm(selection, architectures, jobs)
    if as_json:
        _output.emit_json(
            {"complete": outcome.complete, "kernels": [row.to_json() for row in outcome.rows]}
        )
    else:
        module.emit_failures(outcome)
        click.echo(outcome.summary())
    sys.exit(0 if outcome.complete else 1)


@cli.command()
@click.option(
    "--manifest",
    "manifests",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Kernels that a program used, as `record` wrote them down.",
)
@click.option("--ops", help="Operators, for example nms,roi_align.")
@click.option("--all", "all_ops", is_flag=True, help="All operators.")
@click.option("--dtypes", help="With --ops, --all: float32,float16,bfloat16 by default.")
@click.option("--sizes", help="With --ops, --all: other sizes, for example regions=512,bins=14.")
@click.option("--device", default="cuda", show_default=True, help="A GPU of this machine.")
@click.option(
    "--budget-ms",
    type=click.FloatRange(min=0),
    help="Time to measure for each kernel and problem; TORCHKILN_TUNE_BUDGET_MS or 300.",
)
@click.option(
    "--total-ms",
    type=click.FloatRange(min=0),
    help="Time to measure in all; TORCHKILN_TUNE_TOTAL_MS or 60000.",
)
@click.option("--list", "listing", is_flag=True, help="Only print what can be tuned; no GPU.")
@click.option("--arch", help="With --list: count what is legal there, for example sm_90.")
@_importing
@_json
@_command
def tune(
    manifests: tuple[str, ...],
    ops: str | None,
    all_ops: bool,
    dtypes: str | None,
    sizes: str | None,
    device: str,
    budget_ms: float | None,
    total_ms: float | None,
    listing: bool,
    arch: str | None,
    as_json: bool,
) -> None:
    """Measure which tunables are best on a GPU here, and record them for later processes.

    Operators run forward and backward on workloads of the sizes that models have; --manifest runs
    those that launch its kernels. What is recorded is not measured again: after Ctrl-C, or when the
    time was up, the same command goes on from there.
    """
    from torchkiln_cli import tune as module
    from torchkiln_cli.warm import UsageError, parse_selection, split

    try:
        if listing:
            if manifests or dtypes or sizes:
                raise UsageError("--list goes with --ops and --arch")
            module.emit_spaces(split(ops) if ops else None, arch, as_json)
            return
        if arch:
            raise UsageError("--arch goes with --list; tuning runs on --device")
        selection = parse_selection(manifests, ops, all_ops, dtypes)
        if manifests and sizes:
            raise UsageError("--sizes goes with --ops or --all; a manifest names its own")
        outcome = module.run(selection, module.parse_sizes(sizes), device, budget_ms, total_ms)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    module.emit(outcome, as_json)
    sys.exit(0 if outcome.complete else 1)


@cli.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--out",
    default="torchkiln.manifest.json",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="The manifest; it is added to.",
)
@_json
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
@_command
def record(out: str, as_json: bool, program: tuple[str, ...]) -> None:
    """Run a program and write down the kernels that it uses: record -- python app.py."""
    from torchkiln_cli import record as module

    sys.exit(module.run(out, program, as_json))


@cli.group()
def bundle() -> None:
    """Make, check and look into bundles: kernels for many GPUs in one file."""


@bundle.command("create")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The file to write.")
@_command
@_importing
@_compiling
@_json
def bundle_create(
    out: str, selection: Selection, architectures: list[str], jobs: int | None, as_json: bool
) -> None:
    """Compile kernels and write them into one file."""
    from torchkiln_cli import bundle as module

    sys.exit(0 if module.create(out, selection, architectures, jobs, as_json) else 1)


@bundle.command("verify")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--manifest",
    type=click.Path(exists=True, dir_okay=False),
    help="Kernels that must be in it; by default each one for every architecture in it.",
)
@click.option("--arch", help="Architectures that must be in it; by default those that are.")
@_importing
@_json
@_command
def bundle_verify(file: str, manifest: str | None, arch: str | None, as_json: bool) -> None:
    """Prove that a bundle is whole and complete: code, architectures, symbols, keys."""
    from torchkiln_cli import bundle as module
    from torchkiln_cli.warm import UsageError, check_architecture_names

    try:
        architectures = None if arch is None else check_architecture_names(arch)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    sys.exit(0 if module.verify(file, manifest, architectures, as_json) else 1)


@bundle.command("list")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@_json
@_command
def bundle_list(file: str, as_json: bool) -> None:
    """Print every kernel in a bundle."""
    from torchkiln_cli import bundle as module

    module.list_objects(file, as_json)


@bundle.command("merge")
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The file to write.")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@_json
@_command
def bundle_merge(out: str, files: tuple[str, ...], as_json: bool) -> None:
    """Write one bundle with the kernels of several; it may replace one of them."""
    from torchkiln_cli import bundle as module

    module.merge(out, files, as_json)


@cli.group()
def cache() -> None:
    """Look at the kernel cache, or empty it."""


@cache.command("stat")
@_json
@_command
def cache_stat(as_json: bool) -> None:
    """Print where the cache is and what it holds."""
    from torchkiln_cli import cache as module

    module.stat(as_json)


@cache.command("list")
@_json
@_command
def cache_list(as_json: bool) -> None:
    """Print every compiled kernel, last used first."""
    from torchkiln_cli import cache as module

    module.list_entries(as_json)


@cache.command("clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_json
@_command
def cache_clear(yes: bool, as_json: bool) -> None:
    """Remove every compiled kernel."""
    from torchkiln_cli import cache as module

    module.clear(yes, as_json)


_PLACE = (
    click.argument("op"),
    click.argument("values", nargs=-1, metavar="[NAME=VALUE]..."),
    click.option("--arch", help="An architecture, for example sm_90; by default that of --device."),
    click.option("--device", default=0, show_default=True, help="A GPU of this machine."),
    click.option("--dtypes", help="For example float32,float16; all by default."),
)


def _place(function: _F) -> _F:
    """Adds the arguments that name an operator's kernels on a GPU."""
    for option in reversed(_PLACE):
        function = option(function)
    return function


@cli.command()
@_place
@_importing
@_json
@_command
def explain(
    op: str,
    values: tuple[str, ...],
    arch: str | None,
    device: int,
    dtypes: str | None,
    as_json: bool,
) -> None:
    """Tell which kernels OP runs, where each comes from, and why.

    NAME=VALUE fixes a static parameter or gives a size, such as scalar=half or k=1000; with all
    sizes of a kernel the default that it would take is shown, without them all of its defaults.
    """
    from torchkiln_cli import explain as module
    from torchkiln_cli.warm import UsageError, split

    try:
        names, place = module.parse_values(values), module.where(arch, device)
        reply = module.kernels(op, names, split(dtypes) if dtypes else None, place)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    module.emit(op, reply, as_json)
    sys.exit(1 if any(row["layer"] == "none" for row in reply["kernels"]) else 0)


@cli.command()
@_place
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to write to.")
@click.option(
    "--what", default="source,ptx,sass", show_default=True, help="Also cubin, the machine code."
)
@_importing
@_json
@_command
def dump(
    op: str,
    values: tuple[str, ...],
    arch: str | None,
    device: int,
    dtypes: str | None,
    out: str,
    what: str,
    as_json: bool,
) -> None:
    """Write source, PTX and SASS of the kernels of OP, chosen as by explain.

    SASS needs nvdisasm or cuobjdump; without one the rest is written and the exit code is 1.
    """
    from torchkiln_cli import dump as module
    from torchkiln_cli import explain as explanation
    from torchkiln_cli.warm import UsageError, split

    kinds = split(what)
    for kind in kinds:
        if kind not in module.KINDS:
            raise click.UsageError(f"--what must be among {', '.join(module.KINDS)}; got {kind}")
    try:
        names, place = explanation.parse_values(values), explanation.where(arch, device)
        reply = explanation.kernels(op, names, split(dtypes) if dtypes else None, place)
    except UsageError as error:
        raise click.UsageError(str(error)) from error
    target = f"sm_{reply['architecture']}"
    sys.exit(0 if module.run(reply["kernels"], target, out, kinds, as_json) else 1)


@cli.group()
def compat() -> None:
    """See what the drop-ins for other packages cover."""


@compat.command("mmcv")
@click.option("--check", is_flag=True, help="Resolve every name of mmcv.ops and say what works.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the documentation's table.")
@_json
@_command
def compat_mmcv(check: bool, as_markdown: bool, as_json: bool) -> None:
    """Which names of mmcv.ops work with torchkiln.compat.mmcv."""
    from torchkiln_cli import compat as module

    if not check:
        raise click.UsageError("pass --check to see what works")
    if as_markdown and as_json:
        raise click.UsageError("--markdown and --json exclude each other")
    sys.exit(0 if module.run(as_json=as_json, as_markdown=as_markdown) else 1)


if __name__ == "__main__":
    cli()
