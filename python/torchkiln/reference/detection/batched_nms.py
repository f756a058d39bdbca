"""Suppression inside classes, of every kind of boxes, in plain PyTorch."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchkiln.reference.detection.box_iou_rotated import corners
from torchkiln.reference.detection.line_nms import line_nms_padded, straight_lanes
from torchkiln.reference.detection.nms import nms_padded, output_size
from torchkiln.reference.detection.nms_bev import nms_bev_padded, nms_normal_bev_padded
from torchkiln.reference.detection.nms_rotated import (
    nms3d_normal_padded,
    nms3d_padded,
    nms_quadri_padded,
    nms_rotated_padded,
)
from torchkiln.reference.detection.soft_nms import soft_nms_padded
from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["batched_nms_padded"]

_METHODS = ("naive", "linear", "gaussian")
_PADDED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "nms_rotated": nms_rotated_padded,
    "nms_quadri": nms_quadri_padded,
    "nms_bev": nms_bev_padded,
    "nms_normal_bev": nms_normal_bev_padded,
    "nms3d": nms3d_padded,
    "nms3d_normal": nms3d_normal_padded,
    "line_nms": line_nms_padded,
}
_TYPES = ("nms", "soft_nms", *_PADDED)


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    max_output: int,
    type: str = "nms",
    class_agnostic: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The first `max_output` rows that a type keeps inside classes, then -1; how many they are."""
    classes = None if class_agnostic else idxs
    found = boxes, scores, iou_threshold, max_output
    if type == "nms":
        return nms_padded(*found, idxs=classes, **options)
    if type == "soft_nms":
        method = _METHODS.index(options.pop("method", "linear"))
        softness = {"iou_threshold": iou_threshold, "method": method, "idxs": classes, **options}
        rows, _, count = soft_nms_padded(boxes, scores, max_output, **softness)
        return rows, count
    return _PADDED[type](*found, labels=classes, **options)


# --- what it is tried on ------------------------------------------------------------------------


def parity() -> Parity:
    """What it is tried on; every type has rows of its own."""
    made = {
        "typical": _random("nms", 70),
        **{type: _random(type, 70) for type in _TYPES[1:]},
        "empty": _random("nms", 0),
        "single": _random("nms", 1),
        "panels": _random("nms", 257),
        "nothing_asked": _random("nms", 70, max_output=0),
        "agnostic": _random("nms", 70, class_agnostic=True),
        "agnostic_turned": _random("nms_rotated", 70, class_agnostic=True),
        "options": _random("nms", 70, offset=1.0, score_threshold=0.25),
        "gaussian": _random("soft_nms", 70, method="gaussian", sigma=0.4, min_score=0.1),
        "counterclockwise": _random("nms_rotated", 70, clockwise=False),
        "best": _random("nms_bev", 70, pre_max_size=40),
    }
    return Parity(
        op="batched_nms_padded",
        tier="X",
        function="batched_nms_padded",
        reference=batched_nms_padded,
        fuzz=_fuzz,
        label=lambda arguments: str(arguments["type"]),
        cases=tuple(Case(name, make) for name, make in made.items()),
        workloads=(Workload("padded", {"boxes": 10_000, "classes": 80, "most": 300}, _classified),),
    )


def _notation(type: str, upright: Tensor, angle: Tensor) -> Tensor:
    """Boxes (N, 4) that are turned by angles (N, 1), as a type wants them."""
    center, size = (upright[:, :2] + upright[:, 2:]) / 2, upright[:, 2:] - upright[:, :2]
    turned = torch.cat([center, size, angle], 1)
    if type == "nms_rotated":
        return turned
    if type == "nms_quadri":
        return corners(turned).flatten(1)
    if type.endswith("bev"):
        return torch.cat([upright, angle], 1)
    if type.startswith("nms3d"):
        return torch.cat([center, angle, size, angle, angle], 1)
    return upright


def _random(type: str, count: int, **options: Any) -> Callable[[Inputs], dict[str, Any]]:
    def make(new: Inputs) -> dict[str, Any]:
        if type == "line_nms":
            boxes = straight_lanes(new, count)
        else:
            boxes = _notation(type, new.boxes(count, 40.0), new.uniform(count, 1, low=-2, high=2))
        return {
            "boxes": boxes,
            "scores": new.uniform(count),
            "idxs": new.integers(count, high=4),
            "iou_threshold": 15.321 if type == "line_nms" else 0.2137,
            "max_output": 40,
            "type": type,
        } | options

    return make


def _classified(sizes: Sizes) -> dict[str, Any]:
    boxes, scores, owner = scenes.clustered_scene(sizes["boxes"], scenes.SEED)
    idxs = scenes.classes_of(owner, sizes["classes"], scenes.SEED)
    most = sizes["most"]
    return {
        "boxes": boxes,
        "scores": scores,
        "idxs": idxs,
        "iou_threshold": 0.5,
        "max_output": most,
    }


def _fuzz(draw: Draw) -> dict[str, Any]:
    type, count = draw.option("type", *_TYPES), draw.size(40)
    if type == "line_nms":
        boxes = draw.strange(straight_lanes(draw, count))
    else:
        boxes = _notation(type, draw.boxes(count, 40.0), draw.rotated(count)[:, 4:])
    is_exact = type in ("nms", "nms_normal_bev")
    arguments: dict[str, Any] = {
        "boxes": draw.repeated(boxes, boxes),
        "scores": draw.scores(count),
        "idxs": draw.labels(count, 3),
        # Touching or equal, areas of turned boxes are off by rounding: 0 and 1 decide nothing.
        "iou_threshold": draw.threshold() if is_exact else draw.number(0.01, 0.99),
        "max_output": output_size(draw),
        "type": type,
        "class_agnostic": draw.option("class_agnostic", False, True),
    }
    if type == "soft_nms":
        arguments["scores"] = arguments["scores"].abs()
        arguments["method"] = draw.option("method", *_METHODS)
    if type == "nms_rotated":
        arguments["clockwise"] = draw.option("clockwise", True, False)
    if type == "nms_bev" and draw.chance(0.4):
        arguments["pre_max_size"] = draw.size(30)
    if type == "nms" and draw.chance(0.25):
        arguments["offset"] = draw.pick(1.0, 0.5)
    return arguments
