"""Rows of what pools regions by roi_align's tables: by position, over pyramids, precisely.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import data
from benchmarks.cases import (
    BACKWARD,
    F16,
    F32,
    FORWARD,
    MMCV,
    OURS,
    SEED,
    TORCHVISION,
    Case,
    Pooling,
    Target,
    bound,
    name_of,
    nbytes,
    ours,
    pooling_case,
    side,
    speedup,
    workload,
)
from benchmarks.harness import Call, Inputs, Side, Work
from benchmarks.mmcv_sides import mmcv_sides
from torchkiln.testing import _scenes as scenes

# --- position-sensitive pooling -----------------------------------------------------------------


@dataclass(frozen=True)
class PsPooling(Pooling):
    """A map with channels for each bin."""

    def inputs(
        self, device: torch.device, dtype: torch.dtype, layout: str, direction: str
    ) -> Inputs:
        """As of Pooling, with a gradient for fewer channels."""
        inputs = super().inputs(device, dtype, layout, direction)
        if "grad" in inputs:
            inputs["grad"] = inputs["grad"][:, : self.channels // self.bins**2].contiguous()
        return inputs

    def floor_bytes(self, dtype: torch.dtype, direction: str) -> int:
        """As of Pooling, with an output of fewer channels."""
        unused = self.regions * self.channels * (self.bins**2 - 1)
        return super().floor_bytes(dtype, direction) - nbytes(dtype) * unused


def _ps(operator: str, p: PsPooling, direction: str, layout: str = "NCHW", **options: Any) -> Case:
    ratio = (p.ratio,) if operator == "ps_roi_align" else ()
    arguments = (p.bins, p.scale, *ratio)
    return pooling_case(operator, p, direction, F32, layout, arguments, None, **options)


# --- pyramids -----------------------------------------------------------------------------------

_NAMES = ("input", "level1", "level2", "level3", "level4")


def _levels(inputs: Inputs) -> dict[str, Tensor]:
    return {name: inputs[name] for name in _NAMES}


def _pyramid_call(module: Any, inputs: Inputs, image: tuple[int, int], direction: str) -> Call:
    """The module on the lists that detectors hold; gradients of all levels."""
    images = inputs["input"].shape[0]
    boxes = [inputs["rois"][inputs["rois"][:, 0] == i, 1:].contiguous() for i in range(images)]
    levels, shapes = _levels(inputs), [image] * images
    if direction == FORWARD:
        return lambda: module(levels, boxes, shapes)
    out = module(levels, boxes, shapes)
    leaves, grad = list(levels.values()), torch.empty_like(out).copy_(inputs["grad"])
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)[0]


def _pyramid(
    images: int,
    regions: int,
    bins: int,
    direction: str,
    dtype: torch.dtype = F32,
    layout: str = "NCHW",
    image: tuple[int, int] = (800, 1344),
    channels: int = 256,
    **options: Any,
) -> Case:
    """MultiScaleRoIAlign of P2 to P6, eager, against torchvision's module."""

    def make_module(find: Callable[[], Any]) -> Callable[[Inputs], Call]:
        return lambda inputs: _pyramid_call(find()(list(_NAMES), bins, 2), inputs, image, direction)

    def of_ours() -> Any:
        from torchkiln import nn

        return nn.MultiScaleRoIAlign

    def of_torchvision() -> Any:
        import torchvision

        return torchvision.ops.MultiScaleRoIAlign

    def make(device: torch.device) -> Work:
        last = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        inputs: Inputs = {}
        for i, name in enumerate(_NAMES):
            shape = (images, channels, image[0] // 4 >> i, image[1] // 4 >> i)
            features = data.normal(shape, SEED + i).to(device, dtype, memory_format=last)
            inputs[name] = features.requires_grad_(direction == BACKWARD)
        size = (float(image[0]), float(image[1]))
        inputs["rois"] = scenes.regions(regions, images, SEED, size).to(device, dtype)
        if direction == BACKWARD:
            grad = data.normal((regions, channels, bins, bins), SEED + 1)
            inputs["grad"] = grad.to(device, dtype)
        # A region's level may be any: all of the pyramid is the floor of a gradient only.
        maps = sum(inputs[name].numel() for name in _NAMES) if direction == BACKWARD else 0
        return Work(
            inputs,
            [Side(OURS, make_module(of_ours)), Side(TORCHVISION, make_module(of_torchvision))],
            floor_bytes=nbytes(dtype) * (maps + regions * channels * bins**2) + 20 * regions,
        )

    size = f"{images}x{channels}, P2-P6 of {image[0]}x{image[1]}, {regions} regions, {bins}x{bins}"
    return Case(
        "multi_scale_roi_align", size, name_of(dtype), direction, make, layout=layout, **options
    )


# --- precise pooling ----------------------------------------------------------------------------


def _prroi(
    p: Pooling, direction: str, layout: str = "NCHW", of_boxes: bool = False, **more: Any
) -> Case:
    """prroi_pool against mmcv's; `of_boxes`: the gradient of the boxes alone."""
    names, arguments = ("input", "rois"), (p.bins, p.scale)

    def box_gradient(inputs: Inputs) -> Call:
        rois = inputs["rois"].detach().requires_grad_()
        out = ours("prroi_pool")(inputs["input"].detach(), rois, *arguments)
        return lambda: torch.autograd.grad(out, rois, inputs["grad"], retain_graph=True)[0]

    def of_mmcv(ops: Any, i: Inputs) -> Call:
        return lambda: ops.prroi_pool(i["input"], i["rois"], (p.bins, p.bins), p.scale)

    def make(device: torch.device) -> Work:
        pooled = side(OURS, lambda: bound(ours("prroi_pool"), names, *arguments), direction)
        peers = mmcv_sides(None if of_boxes else of_mmcv, direction)
        return Work(
            p.inputs(device, F32, layout, direction),
            [Side(OURS, box_gradient) if of_boxes else pooled, *peers],
            floor_bytes=p.floor_bytes(F32, FORWARD if of_boxes else direction),
        )

    note = ", gradient of boxes" if of_boxes else ""
    goal = (Target("speedup", 3, 6, MMCV),) if layout == "NCHW" and not of_boxes else ()
    options: dict[str, Any] = {"layout": layout, "targets": goal, "quick": bool(goal), **more}
    return Case("prroi_pool", f"{p}{note}", name_of(F32), direction, make, **options)


def gpu_rows() -> Iterator[Case]:
    """R-FCN's and Light-Head's maps, Faster R-CNN's pyramid, and precise pooling of its map."""
    for operator in ("ps_roi_align", "ps_roi_pool"):
        goal = speedup(3, 5)
        for name in ("rfcn", "light_head"):
            sizes = dict(workload(operator, name))
            p = PsPooling(channels=sizes.pop("outputs") * sizes["bins"] ** 2, **sizes)
            for direction in (FORWARD, BACKWARD):
                quick = name == "rfcn"
                yield _ps(operator, p, direction, targets=goal, quick=quick)
                yield _ps(operator, p, direction, "channels_last")
    for direction in (FORWARD, BACKWARD):
        yield _pyramid(1, 1000, 7, direction, targets=speedup(4, 8), quick=True)
        yield _pyramid(2, 1024, 7, direction, targets=speedup(4, 8), quick=True)
        yield _pyramid(1, 1000, 7, direction, F16)
        yield _pyramid(1, 1000, 7, direction, F16, "channels_last")
        yield _pyramid(1, 100, 14, direction)
    head = Pooling(**workload("prroi_pool", "head"))
    refine = Pooling(**workload("prroi_pool", "refine"))
    for layout in ("NCHW", "channels_last"):
        yield _prroi(head, FORWARD, layout)
        yield _prroi(head, BACKWARD, layout)
        yield _prroi(refine, FORWARD, layout)
    yield _prroi(refine, BACKWARD, of_boxes=True)


GPU_TABLES = (gpu_rows,)


def cpu_rows(threads: int) -> Iterator[Case]:
    """Against torchvision's, with one thread and with all; mmcv has no prroi_pool on the CPU."""
    goal = speedup(1, 2) if threads == 1 else speedup(6, 10)
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "targets": goal, "quick": True}
    map_of_rfcn = PsPooling(1, 490, 50, 84, 300, 7, stride=16)
    for direction in (FORWARD, BACKWARD):
        yield _ps("ps_roi_align", map_of_rfcn, direction, **options)
        yield _ps("ps_roi_pool", map_of_rfcn, direction, **options)
        yield _pyramid(1, 256, 7, direction, image=(400, 672), **options)


def tiny_rows() -> Iterator[Case]:
    """Every builder once, small."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    tiny = PsPooling(1, 18, 12, 14, 5, 3, stride=8, low=16, high=96)
    for direction in (FORWARD, BACKWARD):
        yield _ps("ps_roi_align", tiny, direction, **options)
        yield _ps("ps_roi_pool", tiny, direction, **options)
        yield _pyramid(1, 9, 3, direction, image=(128, 160), channels=8, **options)
        yield _prroi(Pooling(1, 8, 20, 24, 6, 3, stride=8, low=16, high=96), direction, **options)
