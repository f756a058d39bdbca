"""The rows of the benchmark: operator, size, dtype, direction, layout; what each must reach.

A builder below makes the inputs, the sides and the float64 answer of one operator; the tables at
the end list the rows. Sides look their operator up when they are prepared, so one that is missing
fails alone.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import data, plain
from benchmarks.harness import Call, Inputs, Side, Work
from torchkiln import testing
from torchkiln.testing import _scenes as scenes

SEED = scenes.SEED
THRESHOLD = 0.5
RPN_THRESHOLD = 0.7
OURS, TORCHVISION, PLAIN, COMPILED = "torchkiln", "torchvision", "PyTorch", "torch.compile"
MMCV, DEFORMOPS, SPARSEDRIVE = "mmcv", "deformops", "SparseDrive"
MAMBA, CONV = "mamba-ssm", "causal-conv1d"


@dataclass(frozen=True)
class Target:
    """What a row must reach, and what it aims at.

    Targets that many rows share, or that compare two of them, stand in goals.py.

    kind: "speedup" (peer's time / ours), "baseline" (the same, by the row's baseline of that peer
    where it did not run), "host" (ours / peer's, of eager calls), "floor" (share of the floor),
    "memory" (bytes beyond inputs and outputs).
    """

    kind: str
    must: float
    aim: float
    peer: str = TORCHVISION


@dataclass(frozen=True)
class Baseline:
    """Microseconds of a peer on another H200.

    Args:
        peer: name of the peer's side.
        us: its time.
        beside_us: the time of another side in the same table, if it is there.
        beside: that side; where it runs here, too, the peer's time is scaled by it.
    """

    peer: str
    us: float
    beside_us: float | None = None
    beside: str = TORCHVISION


@dataclass(frozen=True)
class Case:
    """One row."""

    operator: str
    size: str
    dtype: str
    direction: str
    make: Callable[[torch.device], Work]
    layout: str = ""
    data: str = ""
    device: str = "cuda"
    threads: int = 0  # CPU: 0 for all
    targets: tuple[Target, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    quick: bool = False

    @property
    def key(self) -> str:
        """Names the row in a report."""
        place = "cuda" if self.device == "cuda" else f"cpu, {self.threads or 'all'} threads"
        parts = [self.operator, self.direction, self.size, self.data, self.dtype, self.layout]
        parts.append(place)
        return " | ".join(part for part in parts if part)

    def described(self) -> dict[str, Any]:
        """The row's description as JSON."""
        names = ("operator", "size", "dtype", "direction", "layout", "data", "device", "threads")
        row: dict[str, Any] = {name: getattr(self, name) for name in names}
        row["targets"] = [dataclasses.asdict(target) for target in self.targets]
        row["baselines"] = [dataclasses.asdict(baseline) for baseline in self.baselines]
        return row


# Ties arguments to inputs. The call that comes out does nothing else, because it is timed.
Bind = Callable[[Inputs], Call]


def bound(function: Callable[..., Any], names: Sequence[str], *rest: Any, **more: Any) -> Bind:
    """Passes the inputs of these names, then the other arguments."""
    return lambda inputs: partial(function, *(inputs[name] for name in names), *rest, **more)


def ours(name: str) -> Callable[..., Any]:
    """Our operator."""
    import torchkiln

    return getattr(torchkiln.ops, name)  # type: ignore[no-any-return]


def torchvision(name: str) -> Callable[..., Any]:
    """The operator of torchvision."""
    import torchvision as package  # type: ignore[import-untyped]

    return getattr(package.ops, name)  # type: ignore[no-any-return]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a composition; its backward may be timed with the graph retained."""
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def nbytes(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype).element_size()


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def timed_call(
    bind: Bind, inputs: Inputs, direction: str, leaves: Sequence[str] = ("input",)
) -> Call:
    """The call of one direction; gradients are those of the inputs that `leaves` names.

    "backward" runs the forward once, outside the timing, and differentiates it again and again with
    inputs["grad"] in the layout of the output. "forward+backward" differentiates with that tensor
    where there is one, else a scalar.
    """
    forward = bind(inputs)
    if direction == "forward":
        return forward
    wanted = [inputs[name] for name in leaves]
    if direction == "forward+backward":
        return lambda: torch.autograd.grad(forward(), wanted, inputs.get("grad"))
    out = forward()
    grad = torch.empty_like(out).copy_(inputs["grad"])
    return lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True)


def side(
    name: str,
    find: Callable[[], Bind],
    direction: str = "forward",
    adapt: Callable[[Inputs], Inputs] = lambda inputs: inputs,
    leaves: Sequence[str] = ("input",),
    **options: Any,
) -> Side:
    """A side whose operator is looked up, and whose inputs are adapted, outside the timing."""
    return Side(name, lambda i: timed_call(find(), adapt(i), direction, leaves), **options)


def oracle_of(
    bind: Bind, direction: str = "forward", leaves: Sequence[str] = ("input",)
) -> Callable[[Inputs], Any]:
    """The float64 answer of one direction."""
    return lambda inputs: timed_call(bind, inputs, direction, leaves)()


# --- nms ----------------------------------------------------------------------------------------


def scene(n: int, kind: str, device: torch.device) -> Inputs:
    """Boxes and scores, uniform or clustered."""
    boxes, scores = (
        scenes.uniform_scene(n, SEED) if kind == "uniform" else scenes.clustered_scene(n, SEED)[:2]
    )
    return {"boxes": boxes.to(device), "scores": scores.to(device)}


def nms(n: int, kind: str = "clustered", threshold: float = RPN_THRESHOLD, **options: Any) -> Case:
    """Every side of nms waits for the number of kept boxes."""
    names = ("boxes", "scores")

    def make(device: torch.device) -> Work:
        return Work(
            scene(n, kind, device),
            [
                side(OURS, lambda: bound(ours("nms"), names, threshold), synchronises=True),
                side(
                    TORCHVISION,
                    lambda: bound(torchvision("nms"), names, threshold),
                    synchronises=True,
                ),
            ],
            oracle=oracle_of(bound(plain.nms, names, threshold)),
        )

    return Case("nms", f"{n} boxes", "float32", "forward", make, data=kind, **options)


def nms_padded(n: int, most: int, **options: Any) -> Case:
    """nms_padded against torchvision's nms: the same answer, cut at `most`, without waiting."""
    names = ("boxes", "scores")

    def cut(function: Callable[..., Tensor]) -> Bind:
        return lambda i: lambda: function(i["boxes"], i["scores"], RPN_THRESHOLD)[:most]

    def make(device: torch.device) -> Work:
        return Work(
            scene(n, "clustered", device),
            [
                side(
                    OURS,
                    lambda: bound(ours("nms_padded"), names, RPN_THRESHOLD, most),
                    result=lambda out: out[0][: int(out[1])],
                ),
                side(TORCHVISION, lambda: cut(torchvision("nms")), synchronises=True),
            ],
            oracle=oracle_of(cut(plain.nms)),
        )

    size = f"{n} boxes, at most {most} kept"
    return Case("nms_padded", size, "float32", "forward", make, data="clustered", **options)


def batched_nms(n: int, classes: int, kind: str = "clustered", **options: Any) -> Case:
    """batched_nms; torchvision chooses itself between offsets and a loop over classes."""
    names = ("boxes", "scores", "idxs")

    def classified() -> tuple[Tensor, Tensor, Tensor]:
        if kind == "uniform":
            idxs = torch.randint(classes, (n,), generator=scenes.generator(SEED))
            return (*scenes.uniform_scene(n, SEED), idxs)
        boxes, scores, owner = scenes.clustered_scene(n, SEED)
        return boxes, scores, scenes.classes_of(owner, classes, SEED)

    def make(device: torch.device) -> Work:
        function = "batched_nms"
        return Work(
            {name: value.to(device) for name, value in zip(names, classified(), strict=True)},
            [
                side(OURS, lambda: bound(ours(function), names, THRESHOLD), synchronises=True),
                side(
                    TORCHVISION,
                    lambda: bound(torchvision(function), names, THRESHOLD),
                    synchronises=True,
                ),
            ],
            oracle=oracle_of(bound(plain.batched_nms, names, THRESHOLD)),
        )

    size = f"{n} boxes, {classes} classes"
    return Case("batched_nms", size, "float32", "forward", make, data=kind, **options)


# --- pooling of regions -------------------------------------------------------------------------


@dataclass(frozen=True)
class Pooling:
    """A feature map, regions on it, and bins."""

    images: int
    channels: int
    height: int
    width: int
    regions: int
    bins: int
    stride: int = 4
    ratio: int = 2
    low: float = 32
    high: float = 512

    @property
    def scale(self) -> float:
        """Cells of the map per pixel of the image."""
        return 1 / self.stride

    def __str__(self) -> str:
        shape = f"{self.images}x{self.channels}x{self.height}x{self.width}"
        return f"{shape}, {self.regions} regions, {self.bins}x{self.bins}"

    def rois(self) -> Tensor:
        """(K, 5) on the CPU; half-precision rows round them."""
        image = (self.height / self.scale, self.width / self.scale)
        return scenes.regions(self.regions, self.images, SEED, image, self.low, self.high)

    def inputs(
        self, device: torch.device, dtype: torch.dtype, layout: str, direction: str
    ) -> Inputs:
        """Feature map, regions and, for a backward, the gradient of the output."""
        shape = (self.images, self.channels, self.height, self.width)
        features = data.normal(shape, SEED).to(device, dtype, copy=True)
        if layout == "channels_last":
            features = features.to(memory_format=torch.channels_last)
        inputs: Inputs = {"input": features, "rois": self.rois().to(device, dtype)}
        if direction == "backward":
            out = (self.regions, self.channels, self.bins, self.bins)
            inputs["grad"] = data.normal(out, SEED + 1).to(device, dtype, copy=True)
            features.requires_grad_()
        return inputs

    def floor_bytes(self, dtype: torch.dtype, direction: str) -> int:
        """The output, the regions, and the map: what regions touch of it, or all of a gradient."""
        elements = self.images * self.channels * self.height * self.width
        if direction == "forward":
            map_size = (self.images, self.height, self.width)
            elements = round(elements * data.touched_share(self.rois(), self.scale, *map_size))
        output = self.regions * self.channels * self.bins**2
        return nbytes(dtype) * (elements + output) + 20 * self.regions


def to_nchw(inputs: Inputs) -> Inputs:
    """The feature map in the layout that torchvision's kernels are written for."""
    features = inputs["input"]
    if features.is_contiguous():
        return inputs
    own = features.detach().contiguous().requires_grad_(features.requires_grad)
    return inputs | {"input": own}


def pooling_case(
    operator: str,
    p: Pooling,
    direction: str,
    dtype: torch.dtype,
    layout: str,
    arguments: tuple[Any, ...],
    composed: Callable[..., Tensor] | None,
    composed_is_peer: bool = False,
    own_options: dict[str, Any] | None = None,
    note: str = "",
    **options: Any,
) -> Case:
    """A row of one pooling operator: ours, torchvision's on its layout and on ours, PyTorch's."""
    names = ("input", "rois")
    answer = bound(composed, names, *arguments) if composed else None

    def own() -> Bind:
        return bound(ours(operator), names, *arguments, **(own_options or {}))

    def theirs() -> Bind:
        return bound(torchvision(operator), names, *arguments)

    def make(device: torch.device) -> Work:
        sides = [side(OURS, own, direction), side(TORCHVISION, theirs, direction, adapt=to_nchw)]
        if layout == "channels_last":
            sides.append(side(f"{TORCHVISION}, channels_last input", theirs, direction))
        if answer and composed_is_peer:
            sides.append(side(PLAIN, lambda: answer, direction))
        return Work(
            p.inputs(device, dtype, layout, direction),
            sides,
            oracle=oracle_of(answer, direction) if answer else None,
            floor_bytes=p.floor_bytes(dtype, direction),
        )

    size = f"{p}{note}"
    return Case(operator, size, name_of(dtype), direction, make, layout=layout, **options)


def roi_align(
    p: Pooling,
    direction: str = "forward",
    dtype: torch.dtype = torch.float32,
    layout: str = "NCHW",
    deterministic: bool = False,
    **options: Any,
) -> Case:
    """roi_align; the plain composition is a peer in float32 on contiguous maps."""
    note = f", ratio {p.ratio}" + (", deterministic" if deterministic else "")
    return pooling_case(
        "roi_align",
        p,
        direction,
        dtype,
        layout,
        (p.bins, p.scale, p.ratio, False),
        plain.roi_align if p.ratio > 0 else None,
        composed_is_peer=dtype == torch.float32 and layout == "NCHW",
        own_options={"deterministic": True} if deterministic else None,
        note=note,
        **options,
    )


def roi_pool(
    p: Pooling,
    direction: str = "forward",
    dtype: torch.dtype = torch.float32,
    layout: str = "NCHW",
    **options: Any,
) -> Case:
    """roi_pool; the float64 answer comes from a loop over the regions, which is no peer."""
    arguments = (p.bins, p.scale)
    return pooling_case(
        "roi_pool", p, direction, dtype, layout, arguments, plain.roi_pool, **options
    )


# --- sigmoid_focal_loss -------------------------------------------------------------------------


def sigmoid_focal_loss(
    rows: int,
    classes: int,
    form: str,
    direction: str = "forward",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    """Forward without reduction; forward+backward of the sum. torchvision gets one-hot labels."""
    names = ("input", "targets")
    reduction = "none" if direction == "forward" else "sum"
    arguments = (0.25, 2.0, reduction)
    operator = "sigmoid_focal_loss"
    function = plain.sigmoid_focal_loss

    def one_hot(i: Inputs) -> Inputs:
        if form == "soft":
            return i
        numbers = torch.arange(classes, device=i["targets"].device)
        return i | {"targets": (i["targets"][:, None] == numbers).to(i["input"].dtype)}

    def make(device: torch.device) -> Work:
        features = scenes.detector_logits(rows, classes).to(device, dtype)
        features.requires_grad_(direction != "forward")
        targets = scenes.detector_targets(rows, classes, form == "soft").to(device)
        targets = targets.to(dtype) if form == "soft" else targets
        elements = rows * classes
        target_bytes = 8 * rows if form == "labels" else nbytes(dtype) * elements
        return Work(
            {"input": features, "targets": targets},
            [
                side(OURS, lambda: bound(ours(operator), names, *arguments), direction),
                side(
                    TORCHVISION,
                    lambda: bound(torchvision(operator), names, *arguments),
                    direction,
                    adapt=one_hot,
                ),
                side(PLAIN, lambda: bound(function, names, *arguments), direction),
                side(
                    COMPILED,
                    lambda: bound(compiled(function), names, *arguments),
                    direction,
                    compiled=True,
                ),
            ],
            oracle=oracle_of(bound(function, names, *arguments), direction),
            floor_bytes=2 * nbytes(dtype) * elements + target_bytes,
        )

    size = f"{rows}x{classes}"
    return Case(operator, size, name_of(dtype), direction, make, data=form, **options)


# --- box_iou ------------------------------------------------------------------------------------


def box_iou(n: int, m: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """Anchors against the objects of an image."""
    names = ("boxes1", "boxes2")

    def make(device: torch.device) -> Work:
        from benchmarks.mmcv_sides import by_name, mmcv_sides

        return Work(
            {
                "boxes1": scenes.uniform_boxes(n, SEED).to(device, dtype),
                "boxes2": scenes.uniform_boxes(m, SEED + 1).to(device, dtype),
            },
            [
                side(OURS, lambda: bound(ours("box_iou"), names)),
                side(TORCHVISION, lambda: bound(torchvision("box_iou"), names)),
                side(PLAIN, lambda: bound(plain.box_iou, names)),
                side(COMPILED, lambda: bound(compiled(plain.box_iou), names), compiled=True),
                *mmcv_sides(by_name("bbox_overlaps", *names)),
            ],
            oracle=oracle_of(bound(plain.box_iou, names)),
            floor_bytes=nbytes(dtype) * (n * m + 4 * (n + m)),
        )

    return Case("box_iou", f"{n}x{m}", name_of(dtype), "forward", make, **options)


# --- the tables ---------------------------------------------------------------------------------

PARITIES = testing.find()


def workload(operator: str, name: str) -> testing.Sizes:
    """The sizes of a workload: what is tuned is measured here as well."""
    (found,) = (w for w in PARITIES[operator].workloads if w.name == name)
    return found.sizes


FPN = Pooling(**workload("roi_align", "pyramid"))
# What a pyramid's second level gets: boxes below 112 pixels.
FPN_LEVEL_2 = dataclasses.replace(FPN, low=16, high=112)
MASK_HEAD = Pooling(**workload("roi_align", "masks"))
MANY = dataclasses.replace(FPN, regions=8192)
SMALL = Pooling(**workload("roi_align", "coarse"))
ODD = Pooling(1, 100, 37, 53, 37, 5, stride=16, ratio=3)
ADAPTIVE = Pooling(1, 256, 100, 168, 512, 7, stride=8, ratio=-1)
HOST = Pooling(1, 4, 16, 16, 8, 7, stride=1, low=2, high=10)
FAST_RCNN_C4 = Pooling(**workload("roi_pool", "c4"))
FAST_RCNN_VGG = Pooling(**workload("roi_pool", "vgg"))
CPU_MAP = Pooling(1, 256, 100, 168, 256, 7, stride=8)
RETINANET = workload("sigmoid_focal_loss", "labels")
LOGITS = RETINANET["rows"], RETINANET["classes"]
ANCHORS = workload("box_iou", "anchors")["n"], workload("box_iou", "anchors")["m"]
TINY_MAP = Pooling(2, 8, 20, 24, 6, 3, stride=8, low=16, high=96)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
FLOOR = Target("floor", 0.5, 0.7)
HOST_ALIGN = Target("host", 0.75, 0.65)
HOST_NMS = Target("host", 0.5, 0.3)


def speedup(must: float, aim: float) -> tuple[Target, ...]:
    """Against torchvision."""
    return (Target("speedup", must, aim),)


# mmcv's RoIAlign of FPN in microseconds, and torchvision's in the same table.
MMCV_ROI_ALIGN = {
    (FORWARD, F32): (Baseline(MMCV, 410.6, 412.7),),
    (FORWARD, F16): (Baseline(MMCV, 417.3, 471.4),),
    (BACKWARD, F32): (Baseline(MMCV, 1984.0, 1986.1),),
    (BACKWARD, F16): (Baseline(MMCV, 3347.0, 1889.6),),
}


def nms_rows() -> Iterator[Case]:
    """The issue's sizes, then others."""
    # One bit for every pair, as the peers keep it.
    mask_bytes = 20_000**2 / 8
    memory = Target("memory", mask_bytes, mask_bytes / 10)
    largest = (Target("baseline", 8, 16, MMCV), memory)
    for kind in ("uniform", "clustered"):
        is_uniform = kind == "uniform"
        of_1000 = (Baseline(MMCV, 546.0, 507.9),) if is_uniform else ()
        of_4000 = (Baseline(MMCV, 1838.9, 1800.0),) if is_uniform else ()
        of_20000 = (Baseline(MMCV, 8174.3, 18398.9),) if is_uniform else ()
        yield nms(1000, kind, targets=speedup(4, 8), baselines=of_1000, quick=True)
        yield nms(4000, kind, targets=speedup(4, 12), baselines=of_4000, quick=True)
        targets = largest if is_uniform else (memory,)
        yield nms(20_000, kind, targets=targets, baselines=of_20000, quick=True)
    yield nms(8, "uniform", targets=(HOST_NMS,), quick=True)
    yield nms(100)
    yield nms(12_345)
    yield nms(100_000)
    yield nms_padded(1000, 1000)
    yield nms_padded(4000, 1000)
    yield nms_padded(20_000, 2000)
    mmcv = (Target("baseline", 6, 20, MMCV),)
    yield batched_nms(
        5000, 80, "uniform", targets=mmcv, baselines=(Baseline(MMCV, 2531.2, 3160.7),), quick=True
    )  # fmt: skip
    yield batched_nms(5000, 80, targets=speedup(6, 20), quick=True)
    yield batched_nms(100, 80)
    yield batched_nms(12_345, 91)
    yield batched_nms(100_000, 80)


def roi_align_rows() -> Iterator[Case]:
    """The issue's map in every layout, dtype and direction, then others."""
    for layout in ("NCHW", "channels_last"):
        for dtype in (F32, F16):
            for direction, goal in ((FORWARD, speedup(3, 5)), (BACKWARD, speedup(4, 8))):
                mmcv = MMCV_ROI_ALIGN[direction, dtype] if layout == "NCHW" else ()
                yield roi_align(
                    FPN, direction, dtype, layout, targets=goal, baselines=mmcv, quick=True
                )  # fmt: skip
    for layout in ("NCHW", "channels_last"):
        yield roi_align(
            FPN, BACKWARD, F32, layout, deterministic=True, targets=speedup(1, 4), quick=True
        )  # fmt: skip
    yield roi_align(HOST, targets=(HOST_ALIGN,), quick=True)
    for layout in ("NCHW", "channels_last"):
        for direction in (FORWARD, BACKWARD):
            yield roi_align(FPN_LEVEL_2, direction, F16, layout, data="boxes below 112 pixels")
            yield roi_align(MASK_HEAD, direction, F16, layout)
            yield roi_align(MANY, direction, F32, layout)
            yield roi_align(ODD, direction, F32, layout)
    yield roi_align(FPN, FORWARD, BF16)
    yield roi_align(SMALL)
    yield roi_align(SMALL, BACKWARD)
    yield roi_align(ADAPTIVE)
    yield roi_align(ADAPTIVE, BACKWARD)


def roi_pool_rows() -> Iterator[Case]:
    """The map of roi_align, then those of the detectors that use roi_pool."""
    goal = speedup(3, 5)
    for dtype in (F32, F16):
        for direction in (FORWARD, BACKWARD):
            yield roi_pool(FPN, direction, dtype, targets=goal, quick=True)
    for direction in (FORWARD, BACKWARD):
        yield roi_pool(FAST_RCNN_C4, direction, targets=goal, quick=True)
        yield roi_pool(FAST_RCNN_VGG, direction, targets=goal, quick=True)
        yield roi_pool(FPN, direction, F32, "channels_last")
        yield roi_pool(SMALL, direction)
        yield roi_pool(ODD, direction)


def focal_rows() -> Iterator[Case]:
    """RetinaNet's logits of one image, both forms of targets; then others."""
    goals = (Target("baseline", 3, 5, MMCV), FLOOR)
    both: dict[str, Any] = {"direction": BOTH, "quick": True}
    yield sigmoid_focal_loss(
        *LOGITS, "labels", targets=(FLOOR,), baselines=(Baseline(MMCV, 239.4),), quick=True
    )  # fmt: skip
    yield sigmoid_focal_loss(
        *LOGITS, "labels", targets=goals, baselines=(Baseline(MMCV, 511.9),), **both
    )
    yield sigmoid_focal_loss(*LOGITS, "soft", targets=(FLOOR,), **both)
    yield sigmoid_focal_loss(*LOGITS, "soft")
    yield sigmoid_focal_loss(*LOGITS, "labels", BOTH, F16)
    yield sigmoid_focal_loss(*LOGITS, "soft", BOTH, F16)
    yield sigmoid_focal_loss(800_000, 80, "labels", BOTH)
    yield sigmoid_focal_loss(22_344, 80, "labels", BOTH)
    yield sigmoid_focal_loss(600, 91, "labels", BOTH)
    yield sigmoid_focal_loss(12_345, 81, "soft", BOTH)


def box_iou_rows() -> Iterator[Case]:
    """RetinaNet's anchors against an image's objects, then others."""
    yield box_iou(*ANCHORS, targets=(FLOOR,), quick=True)
    yield box_iou(*ANCHORS, F16)
    overlaps = (Target("baseline", 5, 10, MMCV),)
    yield box_iou(20_000, 100, targets=overlaps, baselines=(Baseline(MMCV, 205.0),), quick=True)
    yield box_iou(2000, 100)
    yield box_iou(12_345, 37)
    yield box_iou(50_000, 5000)


def cpu_rows(threads: int) -> Iterator[Case]:
    """Ours against torchvision's CPU versions, with one thread and with all."""
    goal = speedup(1, 2) if threads == 1 else speedup(5, 10)
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "targets": goal, "quick": True}
    yield nms(1000, **options)
    yield nms(4000, **options)
    yield batched_nms(5000, 80, **options)
    for direction in (FORWARD, BACKWARD):
        yield roi_align(CPU_MAP, direction, **options)
        yield roi_pool(CPU_MAP, direction, **options)
    yield roi_align(CPU_MAP, FORWARD, F32, "channels_last", **options)
    yield sigmoid_focal_loss(20_000, 80, "labels", **options)
    yield sigmoid_focal_loss(20_000, 80, "labels", BOTH, **options)
    yield box_iou(20_000, 100, **options)


def tiny_rows() -> Iterator[Case]:
    """Every builder once, small: tries the harness where there is no GPU."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    yield nms(64, **options)
    yield nms(2500, "uniform", **options)
    yield nms_padded(64, 16, **options)
    yield batched_nms(64, 5, **options)
    for direction in (FORWARD, BACKWARD):
        for layout in ("NCHW", "channels_last"):
            yield roi_align(TINY_MAP, direction, F32, layout, **options)
            yield roi_pool(TINY_MAP, direction, F32, layout, **options)
    yield roi_align(TINY_MAP, BACKWARD, deterministic=True, **options)
    for form in ("labels", "soft"):
        for direction in (FORWARD, BOTH):
            yield sigmoid_focal_loss(50, 7, form, direction, **options)
    yield box_iou(40, 6, **options)


GPU_TABLES: Sequence[Callable[[], Iterator[Case]]] = (
    nms_rows,
    roi_align_rows,
    roi_pool_rows,
    focal_rows,
    box_iou_rows,
)
# Other files of rows; each has GPU_TABLES, cpu_rows(threads) and tiny_rows().
SUBJECTS = (
    "benchmarks.cases_deformable_aggregation",
    "benchmarks.cases_losses",
    "benchmarks.cases_mamba",
    "benchmarks.cases_msda",
    "benchmarks.cases_roi_family",
    "benchmarks.cases_rotated",
    "benchmarks.cases_rotated_roi",
    "benchmarks.cases_scan",
    "benchmarks.cases_segmentation",
    "benchmarks.cases_suppression",
)


def subjects() -> list[Any]:
    """The other files; not imported above, because they are built from the pieces of this one."""
    return [importlib.import_module(name) for name in SUBJECTS]


def gpu_cases(quick: bool) -> list[Case]:
    """All rows of the GPU, or those of the issue; rows with targets come first."""
    tables = [*GPU_TABLES, *(table for subject in subjects() for table in subject.GPU_TABLES)]
    rows = [case for table in tables for case in table() if case.quick or not quick]
    return sorted(rows, key=lambda case: not case.quick)


def cpu_cases(quick: bool) -> list[Case]:
    """The rows of the CPU; `quick` has the tiny ones instead."""
    others = subjects()
    if quick:
        return [*tiny_rows(), *(case for subject in others for case in subject.tiny_rows())]
    return [
        case
        for threads in (1, 0)
        for table in (cpu_rows, *(subject.cpu_rows for subject in others))
        for case in table(threads)
    ]
