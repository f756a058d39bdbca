"""torchkiln behind torchvision.ops. Registrations are process-wide, so each test has its own."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import textwrap
import traceback
from multiprocessing.connection import Connection
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)

PROLOGUE = """
import contextlib
import torch
from torchkiln.compat import torchvision as drop_in

boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30.0]])
scores = torch.tensor([0.7, 0.9, 0.8])
rois = torch.tensor([[0, 1.0, 1, 6, 6], [0, 2, 0, 7, 5]])

@contextlib.contextmanager
def raises(words):
    try:
        yield
    except RuntimeError as error:
        assert words in str(error), error
    else:
        raise AssertionError("nothing was raised")
"""


# Its children start with torch imported and nothing registered: cheaper than interpreters.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torchkiln.compat.torchvision", "numpy"])


def run(program: str) -> Any:
    """Runs a program in a process of its own; returns what it leaves in `result`."""
    receiver, sender = _server.Pipe(duplex=False)
    process = _server.Process(target=_execute, args=(textwrap.dedent(program), sender))
    process.start()
    sender.close()
    try:
        error, result = receiver.recv()
    except EOFError:
        error, result = "it crashed", None
    process.join()
    assert error is None, error
    return result


def _execute(program: str, sender: Connection) -> None:
    namespace: dict[str, Any] = {}
    try:
        exec(compile(PROLOGUE + program, "program", "exec"), namespace)
    except BaseException:
        sender.send((f"{program}\n{traceback.format_exc()}", None))
    else:
        sender.send((None, namespace.get("result")))


@functools.cache
def is_healthy() -> bool:
    return bool(run("result = drop_in.is_healthy()"))


@pytest.fixture
def _broken():
    """For tests of a torchvision that cannot load its library."""
    if is_healthy():
        pytest.skip("torchvision is healthy here")


@pytest.fixture
def _healthy():
    if not is_healthy():
        pytest.skip("torchvision cannot load its own library with this torch")


def test_importing_torchkiln_changes_nothing():
    run("""
        import sys
        import torchkiln
        assert not [name for name in sys.modules if name.startswith("torchvision")]
        assert not hasattr(torch.ops.torchvision, "nms")
    """)


def test_importing_the_drop_in_changes_nothing():
    run("""
        pooling = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
        both = [name for pool in pooling for name in (pool, f"_{pool}_backward")]
        assert drop_in.provided() == ("nms", *both, "box_iou_rotated")
        assert not hasattr(torch.ops.torchvision, "nms")
    """)


@pytest.mark.usefixtures("_broken")
class TestBroken:
    def test_torchvision_does_not_import_alone(self):
        run("""
            with raises("operator torchvision::nms does not exist"):
                import torchvision
        """)

    def test_torchvision_imports_and_believes_in_its_operators(self):
        run("""
            drop_in.install()
            drop_in.install()
            import torchvision, torchvision.extension
            assert torchvision.extension._has_ops()
            assert torch.ops.torchvision._cuda_version() == -1
            assert not drop_in.is_healthy()
        """)

    def test_install_after_an_import_that_failed(self):
        run("""
            with raises("torchvision::nms"):
                import torchvision
            drop_in.install()
            import torchvision
            assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
        """)

    def test_every_schema_is_there(self):
        run("""
            drop_in.install()
            schema = str(torch.ops.torchvision._roi_align_backward.default._schema)
            assert schema == (
                "torchvision::_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, "
                "SymInt pooled_height, SymInt pooled_width, SymInt batch_size, SymInt channels, "
                "SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor"
            )
            for name in ("nms", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
                assert hasattr(torch.ops.torchvision, name)
            for name in ("roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
                assert hasattr(torch.ops.torchvision, f"_{name}_backward")
            for name in ("qnms", "qroi_align", "box_iou_rotated", "_cuda_version"):
                assert hasattr(torch.ops.torchvision, name)
        """)

    def test_schemas_that_exist_are_left_alone(self):
        run("""
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("qnms(Tensor dets) -> Tensor")
            drop_in.install()
            assert len(torch.ops.torchvision.qnms.default._schema.arguments) == 1
            import torchvision
            assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
        """)

    def test_nms_and_batched_nms(self):
        run("""
            drop_in.install()
            import torchvision
            assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
            assert torchvision.ops.nms(boxes[:0], scores[:0], 0.5).tolist() == []
            classes = torch.tensor([0, 1, 0])
            assert torchvision.ops.batched_nms(boxes, scores, classes, 0.5).tolist() == [1, 2, 0]
            assert drop_in.calls()["nms"] == 3
        """)

    def test_a_failed_check_keeps_its_sentence(self):
        run("""
            drop_in.install()
            import torchvision
            with raises("nms: boxes must have shape (N, 4); got (3, 3)"):
                torchvision.ops.nms(boxes[:, :3], scores, 0.5)
        """)

    def test_operators_that_we_lack_say_so(self):
        run("""
            drop_in.install()
            import torchvision
            image = torch.rand(1, 2, 8, 8)
            with raises("torchvision::deform_conv2d: torchkiln does not provide this operator"):
                offset = torch.zeros(1, 18, 6, 6)
                torchvision.ops.deform_conv2d(image, offset, torch.rand(4, 2, 3, 3))
            with raises("torchvision::qnms: torchkiln does not provide"):
                torch.ops.torchvision.qnms(boxes, scores, 0.5)
        """)

    def test_box_iou_of_rotated_boxes(self):
        """Degrees; a turn from the x axis upwards is positive."""
        run("""
            drop_in.install()
            import math, torchvision
            from torchkiln import ops
            torch.manual_seed(0)
            boxes = torch.rand(2, 20, 5) * torch.tensor([5, 5, 4, 4, 300.0]) + 0.1
            found = torchvision.ops.box_iou(*boxes, fmt="cxcywhr")
            radians = boxes * torch.tensor([1, 1, 1, 1, math.pi / 180])
            expected = ops.box_iou_rotated(*radians, clockwise=False)
            torch.testing.assert_close(found, expected)
            corners = [torchvision.ops.box_convert(b, "cxcywhr", "xyxyxyxy") for b in boxes]
            quads = ops.box_iou_quadri(*corners)
            torch.testing.assert_close(found, quads, rtol=1e-3, atol=1e-3)
        """)

    def test_refused_calls_do_not_keep_their_tensors(self):
        run("""
            drop_in.install()
            image = torch.rand(1, 2, 8, 8)
            before = image._use_count()
            with raises("does not provide"):
                torch.ops.torchvision.qroi_align(image, rois, 1, 0, 1, 0, 1.0, 2, 2, 2, True)
            assert image._use_count() == before
        """)

    def test_roi_align_of_a_ramp(self):
        run("""
            drop_in.install()
            import torchvision
            ramp = torch.arange(8.0).expand(1, 1, 8, 8)
            box = torch.tensor([[2.0, 1, 6, 5]])
            pooled = torchvision.ops.roi_align(ramp, [box], 2, aligned=True)
            torch.testing.assert_close(pooled, torch.tensor([2.5, 4.5]).expand(1, 1, 2, 2))
            assert drop_in.calls()["roi_align"] == 1
        """)

    def test_gradient_of_roi_align(self):
        run("""
            drop_in.install()
            import torchvision
            def crops(image):
                return torchvision.ops.roi_align(image, rois.double(), 3, 0.5, 2, True)
            image = torch.rand(1, 2, 8, 8, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(crops, image)
            assert drop_in.calls()["_roi_align_backward"] > 0
            torch.use_deterministic_algorithms(True)
            assert torch.autograd.gradcheck(crops, image)
        """)

    @pytest.mark.parametrize("side", [8, 300])
    def test_roi_pool_numbers_the_cells_of_a_map(self, side):
        """Torchvision's rule: -1 for a bin beyond the map; the gradient goes to those cells."""
        run(
            """
            side = SIDE
            drop_in.install()
            import torchvision
            assert drop_in.calls()["roi_pool"] == 0
            torch.manual_seed(0)
            for dtype in (torch.float32, torch.float64):
                image = torch.randn(2, 3, side, side + 2, dtype=dtype, requires_grad=True)
                corner = torch.rand(9, 2, dtype=dtype) * side
                index = torch.randint(2, (9, 1)).to(dtype)
                regions = torch.cat([index, corner, corner + side / 2], 1)
                regions[0, 1:] = torch.tensor([2.0, 2, 2, 2]) * side
                pooled, argmax = torch.ops.torchvision.roi_pool(image, regions, 1.0, 2, 3)
                assert pooled.equal(torchvision.ops.roi_pool(image, regions, (2, 3)))
                assert argmax.dtype == torch.int32
                assert argmax.shape == (9, 3, 2, 3)
                assert (argmax[0] == -1).all() and not pooled[0].any()
                planes = image[index[:, 0].long()].flatten(2)
                exact = planes.gather(2, argmax.clamp(min=0).flatten(2).long())
                exact = torch.where(argmax.flatten(2) < 0, 0, exact).view_as(pooled)
                assert pooled.equal(exact)
                along = torch.randn_like(pooled)
                (grad,) = torch.autograd.grad(pooled, image, along, retain_graph=True)
                (expected,) = torch.autograd.grad(exact, image, along)
                torch.testing.assert_close(grad, expected)
            assert drop_in.calls()["roi_pool"] == 4
            assert drop_in.calls()["_roi_pool_backward"] == 2
        """.replace("SIDE", str(side))
        )

    def test_gradient_of_position_sensitive_pooling(self):
        run("""
            drop_in.install()
            import torchvision
            image = torch.rand(1, 8, 9, 9, dtype=torch.float64, requires_grad=True)
            regions = rois.double()
            for name, rest in (("ps_roi_align", (2, 1.0, 2)), ("ps_roi_pool", (2, 1.0))):
                def pool(image):
                    return getattr(torchvision.ops, name)(image, regions, *rest)
                if name == "ps_roi_align":
                    assert torch.autograd.gradcheck(pool, image)
                else:  # its forward and backward disagree at the border
                    torch.autograd.grad(pool(image).sum(), image)
                assert drop_in.calls()[f"_{name}_backward"] > 0
        """)

    def test_position_sensitive_pooling_has_their_quirks(self):
        run("""
            drop_in.install()
            image = torch.ones(1, 4, 4, 4)
            image[..., 3, :] = 100
            whole = torch.tensor([[0.0, 0, 0, 4, 4]])
            pooled, channels = torch.ops.torchvision.ps_roi_pool(image, whole, 1.0, 2, 2)
            assert pooled.flatten().tolist() == [1, 1, 1, 1]
            assert channels.flatten().tolist() == [0, 1, 2, 3]
            point = torch.tensor([[0.0, 1, 1, 1, 1]])
            align = torch.ops.torchvision.ps_roi_align
            assert align(image, point, 1.0, 2, 2, -1)[0].isnan().all()
            assert align(image, point, 1.0, 2, 2, 2)[0].isfinite().all()
        """)

    def test_autocast_runs_in_float32_and_gives_the_dtype_back(self):
        run("""
            drop_in.install()
            import torchvision
            image = torch.rand(1, 2, 8, 8)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = torchvision.ops.roi_align(image.bfloat16(), rois.bfloat16(), 2)
                keep = torchvision.ops.nms(boxes.bfloat16(), scores.bfloat16(), 0.5)
            assert half.dtype == torch.bfloat16
            assert keep.tolist() == [1, 2]
        """)

    def test_compiles_into_one_graph(self):
        run("""
            drop_in.install()
            import torchvision
            def crops(image, rois):
                return torchvision.ops.roi_align(image, rois, 2) * 2
            image = torch.rand(1, 2, 8, 8)
            compiled = torch.compile(crops, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(image, rois), crops(image, rois))
        """)

    def test_a_detection_model_runs(self):
        run("""
            drop_in.install()
            import torchvision
            model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
                weights=None, weights_backbone=None
            ).eval()
            with torch.no_grad():
                (found,) = model([torch.rand(3, 96, 96)])
            assert set(found) == {"boxes", "labels", "scores"}
            calls = drop_in.calls()
            assert calls["nms"] > 0
        """)

    def test_uninstall_leaves_things_as_they_are(self):
        run("""
            drop_in.install()
            import torchvision
            drop_in.uninstall()
            assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
        """)


def test_kernels_are_covered_and_uncovered():
    """Needs no healthy torchvision: something else stands for its library."""
    run("""
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, "
            "SymInt pooled_width, int sampling_ratio, bool aligned) -> Tensor"
        )
        library.define("_roi_align_backward(Tensor grad) -> Tensor")
        library.define("box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor")
        library.impl("box_iou_rotated", lambda boxes1, boxes2: torch.tensor(42), "CPU")
        library.impl("nms", lambda dets, scores, iou_threshold: torch.tensor([42]), "CPU")
        drop_in._own_library_loads = lambda: True

        def nms():
            return torch.ops.torchvision.nms(boxes, scores, 0.5).tolist()

        def own():
            turned = torch.tensor([[0, 0, 2, 2, 30.0]])
            return torch.ops.torchvision.box_iou_rotated(turned, turned)

        assert nms() == [42] and own() == 42
        for _ in range(3):
            drop_in.install()
            assert nms() == [1, 2]
            torch.testing.assert_close(own(), torch.ones(1, 1))
            assert drop_in.is_healthy()
            drop_in.uninstall()
            assert nms() == [42] and own() == 42
        assert drop_in.calls()["nms"] == drop_in.calls()["box_iou_rotated"] == 3
        assert not hasattr(torch.ops.torchvision, "qnms")
    """)


@pytest.mark.usefixtures("_healthy")
class TestHealthy:
    def test_install_covers_and_uninstall_uncovers(self):
        run("""
            import torchvision
            def both():
                with torch.no_grad():
                    torchvision.ops.nms(boxes, scores, 0.5)
                    return torchvision.ops.roi_align(torch.ones(1, 2, 8, 8), rois, 2)
            before = both()
            assert sum(drop_in.calls().values()) == 0
            for _ in range(2):
                drop_in.install()
                assert drop_in.is_healthy()
                counted = sum(drop_in.calls().values())
                torch.testing.assert_close(both(), before)
                assert sum(drop_in.calls().values()) == counted + 2
                drop_in.uninstall()
                drop_in.uninstall()
                assert torch.equal(both(), before)
                assert sum(drop_in.calls().values()) == counted + 2
        """)

    def test_install_before_the_import(self):
        run("""
            drop_in.install()
            import torchvision
            assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [1, 2]
            assert drop_in.calls()["nms"] == 1
        """)

    def test_operators_that_we_lack_stay_theirs(self):
        run("""
            drop_in.install()
            import torchvision
            image, offset = torch.ones(1, 2, 8, 8), torch.zeros(1, 18, 6, 6)
            out = torchvision.ops.deform_conv2d(image, offset, torch.ones(4, 2, 3, 3))
            torch.testing.assert_close(out, torch.full((1, 4, 6, 6), 18.0))
        """)

    def test_roi_pool_equals_theirs(self):
        run("""
            import torchvision
            device = "cuda" if torch.cuda.is_available() else "cpu"
            torch.manual_seed(0)
            image = torch.randn(2, 3, 20, 30, device=device, requires_grad=True)
            corner = torch.randint(-4, 28, (40, 2), device=device)
            size = torch.randint(0, 4, (40, 2), device=device) * 7
            index = torch.randint(2, (40, 1), device=device)
            regions = torch.cat([index, corner, corner + size], 1).float()
            def results():
                found = torch.ops.torchvision.roi_pool(image, regions, 1.0, 2, 2)
                return [*found, *torch.autograd.grad(found[0].square().sum(), image)]
            theirs = results()
            drop_in.install()
            for ours, expected in zip(results(), theirs, strict=True):
                torch.testing.assert_close(ours, expected)
            assert drop_in.calls()["_roi_pool_backward"] == 1
            drop_in.uninstall()
            for ours, expected in zip(results(), theirs, strict=True):
                torch.testing.assert_close(ours, expected)
            assert drop_in.calls()["_roi_pool_backward"] == 1
        """)

    def test_position_sensitive_pooling_equals_theirs(self):
        run("""
            import torchvision
            device = "cuda" if torch.cuda.is_available() else "cpu"
            torch.manual_seed(0)
            image = torch.randn(1, 18, 12, 14, device=device, requires_grad=True)
            corner = torch.rand(30, 2, device=device) * 10 - 1
            far = corner + torch.rand(30, 2, device=device) * 9
            regions = torch.cat([torch.zeros(30, 1, device=device), corner, far], 1)
            def results():
                found = []
                for name, rest in (("ps_roi_align", (3, 1.0, -1)), ("ps_roi_pool", (3, 1.0))):
                    pooled = getattr(torchvision.ops, name)(image, regions, *rest)
                    found += [pooled, *torch.autograd.grad(pooled.square().sum(), image)]
                return found
            theirs = results()
            drop_in.install()
            for ours, expected in zip(results(), theirs, strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
            assert drop_in.calls()["_ps_roi_pool_backward"] == 1
        """)

    def test_gradient_goes_through_our_kernels(self):
        run("""
            import torchvision
            device = "cuda" if torch.cuda.is_available() else "cpu"
            image = torch.rand(1, 2, 8, 8, device=device, requires_grad=True)
            regions = rois.to(device)
            def gradient():
                (grad,) = torch.autograd.grad(
                    torchvision.ops.roi_align(image, regions, 2, 1.0, 2).square().sum(), image
                )
                return grad
            before = gradient()
            drop_in.install()
            torch.testing.assert_close(gradient(), before)
            assert drop_in.calls()["_roi_align_backward"] == 1
        """)

    @pytest.mark.gpu
    def test_on_the_gpu(self):
        run("""
            import torchvision
            expected = torchvision.ops.nms(boxes.cuda(), scores.cuda(), 0.5)
            drop_in.install()
            assert torchvision.ops.nms(boxes.cuda(), scores.cuda(), 0.5).equal(expected)
            assert drop_in.calls()["nms"] == 1
        """)


PYRAMID = """
from torchkiln import ops
torch.manual_seed(0)
calls = []
ours = ops.multi_scale_roi_align
ops.multi_scale_roi_align = lambda *arguments: calls.append(1) or ours(*arguments)

def pyramid(names="0123", dtype=torch.float32):
    sides = {name: 64 // 2**i for i, name in enumerate(names)}
    return {name: torch.randn(2, 3, side, side, dtype=dtype) for name, side in sides.items()}

def images_boxes(count):
    corner, size = torch.rand(2, count, 2) * 200, torch.rand(2, count, 2) ** 3 * 400
    return list(torch.cat([corner, corner + size], 2))

SHAPES = [(256, 256), (250, 200)]
"""


def test_multi_scale_roi_align_takes_one_launch():
    """The class is torchvision's: state, gradient, and what torchvision gives, before and after."""
    run(f"""{PYRAMID}
drop_in.install()
import torchvision
from torchvision.ops import MultiScaleRoIAlign, poolers
pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 3, 2)
maps, boxes = pyramid(), images_boxes(40)
for level in maps.values():
    level.requires_grad_()
def results():
    pooled = pool(maps, boxes, SHAPES)
    return [pooled, *torch.autograd.grad(pooled.square().sum(), maps.values())]
found = results()
assert calls and pool.scales == [0.25, 0.125, 0.0625, 0.03125]
assert type(pool.map_levels) is poolers.LevelMapper and "featmap_names" in repr(pool)
calls.clear()
theirs = poolers._multiscale_roi_align.__original_fn
drop_in._pyramid.uninstall()
assert poolers._multiscale_roi_align is theirs
for ours_, expected in zip(found, results(), strict=True):
    torch.testing.assert_close(ours_, expected, rtol=1e-4, atol=1e-5)
assert not calls
drop_in._pyramid.install()
assert torch.equal(pool(maps, boxes, SHAPES), found[0]) and calls
""")


def test_multi_scale_roi_align_leaves_the_rest_to_torchvision():
    """One level, levels left out, two dtypes, traces; scripts compile torchvision's function."""
    run(f"""{PYRAMID}
drop_in.install()
import torchvision
from torchvision.ops import MultiScaleRoIAlign
maps, boxes = pyramid(), images_boxes(9)
for names in (["1"], ["0", "2"]):
    pooled = MultiScaleRoIAlign(names, 2, 2)(maps, boxes, SHAPES)
    assert pooled.shape == (18, 3, 2, 2) and not calls
pool = MultiScaleRoIAlign(["0", "1", "2"], 2, 2)
mixed = {{**maps, "1": maps["1"].double()}}
try:
    pool(mixed, boxes, SHAPES)
except RuntimeError:
    pass  # roi_align wants boxes and map of one dtype
assert not calls
expected = pool(maps, boxes, SHAPES)
assert calls
calls.clear()
scripted = torch.jit.script(MultiScaleRoIAlign(["0", "1", "2"], 2, 2))
assert not calls
with torch.autocast("cpu", dtype=torch.bfloat16):
    half = {{name: level.bfloat16() for name, level in maps.items()}}
    pooled = pool(half, boxes, SHAPES)
assert pooled.dtype == torch.bfloat16 and calls
torch.testing.assert_close(pooled.float(), expected, rtol=0.02, atol=0.02)
compiled = torch.compile(pool, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(maps, boxes, SHAPES), expected)
""")


def test_our_compositions_equal_theirs():
    """Where boxes are ordinary; theirs are Python, which no `install()` replaces."""
    run("""
        import itertools
        drop_in.install()
        import torchvision
        from torchkiln import ops
        theirs = torchvision.ops
        close = torch.testing.assert_close

        torch.manual_seed(0)
        first = torch.rand(2, 30, 2) * 50
        a, b = torch.cat([first, first + 1 + torch.rand(2, 30, 2) * 40], 2)
        for form in ("xyxy", "xywh", "cxcywh"):
            close(ops.box_area(a, form), theirs.box_area(a, form))
            for other in ("xyxy", "xywh", "cxcywh"):
                close(ops.box_convert(a, form, other), theirs.box_convert(a, form, other))
        turned = torch.cat([a, torch.rand(30, 1) * 340 - 170], 1)
        corners = theirs.box_convert(turned, "xywhr", "xyxyxyxy")
        forms = {"xywhr": turned, "cxcywhr": turned, "xyxyxyxy": corners}
        for (form, rows), other in itertools.product(forms.items(), forms):
            expected = theirs.box_convert(rows, form, other)
            close(ops.box_convert(rows, form, other), expected, rtol=1e-5, atol=1e-4)
        close(ops.clip_boxes_to_image(a, (40, 30)), theirs.clip_boxes_to_image(a, (40, 30)))
        assert ops.remove_small_boxes(a, 20).equal(theirs.remove_small_boxes(a, 20))
        masks = torch.rand(9, 12, 15) > 0.98
        close(ops.masks_to_boxes(masks), theirs.masks_to_boxes(masks))

        a.requires_grad_()
        for name in ("generalized", "distance", "complete"):
            for reduction in ("none", "mean", "sum"):
                losses = [
                    getattr(space, f"{name}_box_iou_loss")(a, b, reduction)
                    for space in (ops, theirs)
                ]
                close(*losses)
                close(*(torch.autograd.grad(loss.sum(), a) for loss in losses))
    """)


def test_without_torchvision():
    run("""
        from importlib import util
        from torchkiln.compat import torchvision as module
        module.find_spec = lambda name: None
        assert not drop_in.is_healthy()
        try:
            drop_in.install()
        except ModuleNotFoundError as error:
            assert "pip install torchvision" in str(error)
        else:
            raise AssertionError
    """)
