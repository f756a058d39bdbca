"""The module tree in place of mmcv.ops: names, signatures, imports, installing and taking back."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import multiprocessing
import re
import subprocess
import sys
import textwrap
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from torchkiln.compat import mmcv as drop_in
from torchkiln.compat.mmcv import _coverage, _names
from torchkiln_cli.main import cli

DOCUMENT = Path(__file__).parents[2] / "docs" / "compat_mmcv.md"
PUBLIC = list(_names.public().values())
ALL = [row for names in _names.MODULES.values() for row in names.values()]
MISSING = [row for row in ALL if not row.operator]

# Independent of the table: some signatures as mmcv's users know them, and the registry.
SIGNATURES = {
    "nms": "(boxes, scores, iou_threshold, offset=0, score_threshold=0, max_num=-1)",
    "batched_nms": "(boxes, scores, idxs, nms_cfg, class_agnostic=False)",
    "soft_nms": "(boxes, scores, iou_threshold=0.3, sigma=0.5, min_score=0.001, "
    "method='linear', offset=0)",
    "roi_align": "(input, rois, output_size, spatial_scale=1.0, sampling_ratio=0, "
    "pool_mode='avg', aligned=True)",
    "RoIAlign": "(output_size, spatial_scale=1.0, sampling_ratio=0, pool_mode='avg', "
    "aligned=True, use_torchvision=False)",
    "box_iou_rotated": "(bboxes1, bboxes2, mode='iou', aligned=False, clockwise=True)",
    "roi_align_rotated": "(input, rois, output_size, spatial_scale, sampling_ratio=0, "
    "aligned=True, clockwise=False)",
    "deform_conv2d": "(input, offset, weight, stride=1, padding=0, dilation=1, groups=1, "
    "deform_groups=1, bias=False, im2col_step=32)",
    "MaskedConv2d": "(in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, "
    "groups=1, bias=True)",
    "PrRoIPool": "(output_size, spatial_scale=1.0)",
    "Correlation": "(kernel_size=1, max_displacement=1, stride=1, padding=0, dilation=1, "
    "dilation_patch=1)",
    "voxelization": "(points, voxel_size, coors_range, max_points=35, max_voxels=20000, "
    "deterministic=True)",
}
REGISTRY = {
    "carafe": "CARAFEPack",
    "CrissCrossAttention": "CrissCrossAttention",
    "DCN": "DeformConv2dPack",
    "DCNv2": "ModulatedDeformConv2dPack",
    "MultiScaleDeformableAttention": "MultiScaleDeformableAttention",
    "SAC": "SAConv2d",
    "MMSyncBN": "SyncBatchNorm",
    **{
        name: name
        for form in ("SparseConv", "SubMConv", "SparseConvTranspose", "SparseInverseConv")
        for name in (f"{form}2d", f"{form}3d")
    },
    "SparseConv4d": "SparseConv4d",
    "SubMConv4d": "SubMConv4d",
}


def _listed() -> list[tuple[str, str, str]]:
    """Module, name and parameters of mmcv_names.txt, which was read from mmcv's sources."""
    rows, module = [], ""
    for line in (Path(__file__).parent / "mmcv_names.txt").read_text().splitlines():
        if line.startswith("["):
            module = line.strip("[]")
        elif not line.startswith("#"):
            name, _, parameters = line.partition("(")
            rows.append((module, name, f"({parameters}"))
    return rows


@pytest.fixture
def ops():
    """`mmcv.ops` while the drop-in is installed."""
    drop_in.install()
    yield importlib.import_module("mmcv.ops")
    drop_in.uninstall()


# Its children start with torch imported and nothing else: cheaper than interpreters.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "numpy"])


def run(program: str) -> None:
    """Runs a program in a process of its own: what it imports stays there."""
    receiver, sender = _server.Pipe(duplex=False)
    process = _server.Process(target=_execute, args=(textwrap.dedent(program), sender))
    process.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:
        error = "it crashed"
    process.join()
    assert error is None, error


def _execute(program: str, sender: Connection) -> None:
    try:
        exec(compile(program, "program", "exec"), {})
    except SystemExit:
        sender.send(None)
    except BaseException:
        sender.send(f"{program}\n{traceback.format_exc()}")
    else:
        sender.send(None)


def identifier(row: _names.Name) -> str:
    return row.path


def test_there_are_124_public_names():
    assert len(PUBLIC) == 124
    assert len({row.name for row in PUBLIC}) == 124


@pytest.mark.parametrize("row", ALL, ids=identifier)
def test_name_is_importable(ops, row):
    module = importlib.import_module(f"mmcv.ops.{row.module}")
    value = getattr(module, row.name)
    assert inspect.isclass(value) == (row.kind in ("class", "function"))
    if row.public:
        assert getattr(ops, row.name) is value
        assert row.name in ops.__all__


def _parameters(call: object) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    values = inspect.signature(call).parameters.values()
    return ", ".join(stars.get(p.kind, "") + p.name for p in values if p.name != "self")


@pytest.mark.parametrize(("module", "name", "expected"), _listed(), ids=lambda part: part[:40])
def test_name_has_the_parameters_of_the_peers_source(ops, module, name, expected):
    value = getattr(importlib.import_module(f"mmcv.ops.{module}"), name)
    is_function = inspect.isclass(value) and issubclass(value, torch.autograd.Function)
    found = f"({_parameters(value.apply if is_function else value)})"
    constructor, _, forward = expected.partition(" forward")
    assert found == constructor
    row = _names.MODULES[module][name]
    if forward and row.operator:
        assert f"({_parameters(value.forward)})" == forward


def test_every_name_has_the_signature_of_the_table():
    assert _coverage.problems() == []


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(ops, name):
    signature = inspect.signature(getattr(ops, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


@pytest.mark.parametrize("row", MISSING, ids=identifier)
def test_what_is_missing_raises_when_used_and_names_itself(ops, row):
    value = getattr(importlib.import_module(f"mmcv.ops.{row.module}"), row.name)
    call = value.apply if row.kind == "function" else value
    with pytest.raises(NotImplementedError, match=f"^{re.escape(row.path)}: is not in torchkiln"):
        call(1, 2)


def test_missing_classes_can_be_derived_from(ops):
    class Own(ops.DeformConv2dPack):
        def __init__(self, channels):
            super().__init__(channels, channels, 3)

    assert issubclass(Own, ops.DeformConv2d)
    assert issubclass(ops.MaskedConv2d, torch.nn.Conv2d)
    assert str(inspect.signature(Own)) == "(channels)"
    with pytest.raises(NotImplementedError, match=r"^mmcv.ops.DeformConv2dPack"):
        Own(4)


def test_a_function_hides_the_module_of_its_name(ops):
    from mmcv.ops.nms import NMSop, batched_nms
    from mmcv.ops.roi_align import RoIAlign

    assert inspect.isfunction(ops.nms)
    assert inspect.ismodule(ops.focal_loss)
    assert inspect.isfunction(ops.roi_align)
    assert ops.batched_nms is batched_nms
    assert ops.RoIAlign is RoIAlign
    assert issubclass(NMSop, torch.autograd.Function)


def test_unknown_names_are_attribute_errors(ops):
    for module in (ops, ops.focal_loss):
        with pytest.raises(AttributeError, match="has no attribute 'unknown'"):
            module.unknown  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mmcv.ops.unknown")


def test_dir_lists_what_is_there(ops):
    assert {row.name for row in PUBLIC} <= set(dir(ops))
    assert {"RoIAlign", "RoIAlignFunction", "roi_align"} <= set(
        dir(sys.modules["mmcv.ops.roi_align"])
    )


def test_importing_torchkiln_or_the_drop_in_changes_nothing():
    program = """
        import sys
        import torchkiln
        assert "torchkiln.compat.mmcv" not in sys.modules
        mmcv = torchkiln.compat.mmcv
        assert "torchkiln.compat.mmcv._names" not in sys.modules
        assert not [name for name in sys.modules if name.split(".")[0] in ("mmcv", "mmengine")]
        finders = list(sys.meta_path)
        mmcv.install()
        mmcv.install()
        mmcv.uninstall()
        mmcv.uninstall()
        assert sys.meta_path == finders
        assert "mmengine" not in sys.modules
    """
    # An interpreter of its own: other children have imported this file.
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_single_name_loads_no_other():
    """But those that mmengine's registry holds as classes."""
    run("""
        import sys
        from torchkiln.compat import mmcv
        from torchkiln.compat.mmcv import _names
        mmcv.install()
        from mmcv.ops import bbox_overlaps
        loaded = {name.rpartition(".")[2] for name in sys.modules if "mmcv._ops." in name}
        assert loaded - {row.module for row in _names.registered()} == {"bbox"}, loaded
    """)


def test_the_package_itself_has_the_tree():
    run("""
        import torchkiln.compat.mmcv as mmcv
        import sys
        assert callable(mmcv.ops.nms)
        assert "mmcv.ops" not in sys.modules
    """)


# A package in place of what may be installed, so that each form is tried everywhere.
FAKE = """
import importlib, pathlib, sys, tempfile
folder = pathlib.Path(tempfile.mkdtemp())
def package(name, text=""):
    path = folder / name.replace(".", "/")
    path.mkdir(parents=True)
    (path / "__init__.py").write_text(text)
sys.path[:] = [entry for entry in sys.path if not pathlib.Path(entry or ".", "mmcv").is_dir()
               and not pathlib.Path(entry or ".", "mmengine").is_dir()]
sys.path.insert(0, str(folder))
from torchkiln.compat import mmcv as drop_in
"""


def test_without_an_mmcv_there_is_a_minimal_package():
    run(f"""{FAKE}
drop_in.install()
import mmcv
from mmcv.ops import nms
assert mmcv.__version__ == "2.2.0" and mmcv.ops.nms is nms
drop_in.uninstall()
try:
    import mmcv
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("mmcv is still there")
""")


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_beside_an_mmcv_without_ops(before):
    run(f"""{FAKE}
package("mmcv", "__version__ = '2.1.0'")
if {before}:
    import mmcv
drop_in.install()
import mmcv
if not {before}:
    import mmcv.ops
assert mmcv.__version__ == "2.1.0" and callable(mmcv.ops.batched_nms)
drop_in.uninstall()
assert not hasattr(mmcv, "ops") and "mmcv.ops.nms" not in sys.modules
""")


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_over_an_mmcv_with_ops_of_its_own(before):
    run(f"""{FAKE}
package("mmcv")
package("mmcv.ops", "theirs = True")
package("mmcv.ops.nms")
if {before}:
    import mmcv.ops.nms
drop_in.install()
import mmcv.ops
from mmcv.ops.nms import batched_nms
assert not hasattr(mmcv.ops, "theirs") and mmcv.ops.batched_nms is batched_nms
drop_in.uninstall()
import mmcv.ops.nms
assert mmcv.ops.theirs and not hasattr(mmcv.ops.nms, "batched_nms")
""")


REGISTRY_FAKE = (
    "class _Registry:\\n"
    "    def __init__(self): self.module_dict = {'DCN': 'theirs'}\\n"
    "    def register_module(self, name, force, module):\\n"
    "        assert force or name not in self.module_dict\\n"
    "        self.module_dict[name] = module\\n"
    "MODELS = _Registry()\\n"
)


def test_registry_entries_and_their_return():
    run(f"""{FAKE}
package("mmengine")
(folder / "mmengine" / "registry.py").write_text("{REGISTRY_FAKE}")
drop_in.install()
import mmcv.ops
from mmengine.registry import MODELS
found = {{key: value.__name__ for key, value in MODELS.module_dict.items()}}
assert found == {REGISTRY!r}, found
assert MODELS.module_dict["DCN"] is mmcv.ops.DeformConv2dPack
drop_in.uninstall()
assert MODELS.module_dict == {{"DCN": "theirs"}}
""")


@pytest.mark.parametrize("package", ["mmcv", "mmengine", "mmdet"])
def test_with_the_real_packages(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    programs = {
        "mmcv": """
            import mmcv
            from mmcv.ops import nms
            import mmcv.cnn
            assert mmcv.__file__ and mmcv.ops.nms is nms and mmcv.cnn.Conv2d
        """,
        "mmengine": """
            import mmcv.ops
            from mmengine.registry import MODELS
            assert MODELS.get("DCNv2") is mmcv.ops.ModulatedDeformConv2dPack
        """,
        "mmdet": """
            import mmdet.models
            from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
            import mmcv.ops, torch
            extractor = SingleRoIExtractor(
                dict(type="RoIAlign", output_size=7, sampling_ratio=0), 8, [4, 8])
            assert type(extractor.roi_layers[0]) is mmcv.ops.RoIAlign
            levels = torch.rand(1, 8, 16, 16), torch.rand(1, 8, 8, 8)
            rois = torch.tensor([[0, 1.0, 2, 30, 40]])
            assert extractor(levels, rois).shape == (1, 8, 7, 7)
        """,
    }
    run(
        "from torchkiln.compat import mmcv as drop_in\ndrop_in.install()\n"
        + textwrap.dedent(programs[package])
    )


def test_check_prints_the_coverage():
    result = CliRunner().invoke(cli, ["compat", "mmcv", "--check"])
    assert result.exit_code == 0, result.output
    assert f"{len(drop_in.provided())} of 124 names work" in result.output


def test_check_as_json():
    result = CliRunner().invoke(cli, ["compat", "mmcv", "--check", "--json"])
    data = json.loads(result.output)
    assert data["problems"] == []
    states = {row["name"]: row["state"] for row in data["names"]}
    assert len(states) == 124
    assert states["roi_align"] == "torchkiln.ops.roi_align"
    assert {name for name, state in states.items() if state != "not yet"} == set(drop_in.provided())


def test_check_finds_a_wrong_signature(monkeypatch):
    from torchkiln.compat.mmcv._ops import bbox

    row = _names.MODULES["bbox"]["bbox_overlaps"]
    monkeypatch.setattr(bbox, "bbox_overlaps", lambda boxes: boxes)
    monkeypatch.delitem(
        vars(sys.modules["torchkiln.compat.mmcv._tree"].modules()["mmcv.ops.bbox"]),
        "bbox_overlaps",
        raising=False,
    )
    assert _coverage.problems() == [f"{row.path}: must have the signature {row.signature}"]
    result = CliRunner().invoke(cli, ["compat", "mmcv", "--check"])
    assert result.exit_code == 1
    vars(_coverage._tree.modules()["mmcv.ops.bbox"]).pop("bbox_overlaps")


def test_the_command_needs_check():
    result = CliRunner().invoke(cli, ["compat", "mmcv"])
    assert result.exit_code == 2
    assert "pass --check" in result.output


def test_the_documentation_has_the_generated_table():
    text = DOCUMENT.read_text()
    table = text.partition("<!-- coverage -->\n")[2].partition("<!-- end of coverage -->")[0]
    assert table == _coverage.markdown(), (
        "regenerate it with: torchkiln compat mmcv --check --markdown"
    )


def test_each_quirk_of_the_documentation_has_its_test():
    quirks = set(re.findall(r"`(test_quirk_\w+)`", DOCUMENT.read_text()))
    source = "".join(path.read_text() for path in Path(__file__).parent.glob("test_mmcv*.py"))
    assert quirks == set(re.findall(r"def (test_quirk_\w+)", source))
