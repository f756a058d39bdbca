"""mmcv's operators as sides of the benchmark, where an mmcv with compiled operators is installed.

Each is called as mmcv's users call it, on the inputs of our side.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import FORWARD, MMCV, side
from benchmarks.harness import Call, Inputs, Side, on_default_stream

# Makes the timed call from mmcv.ops and the inputs.
PeerCall = Callable[[Any, Inputs], Call]


@functools.cache
def is_built() -> bool:
    """True if mmcv's compiled operators can be imported; mmcv-lite has none."""
    return importlib.util.find_spec("mmcv") is not None and (
        importlib.util.find_spec("mmcv._ext") is not None
    )


def mmcv_sides(
    call: PeerCall | None, direction: str = FORWARD, unordered: bool = False, **options: Any
) -> list[Side]:
    """One side, or none where mmcv is not built or has no such operator on this device.

    unordered: kernels run on the default stream, whatever the current one is.
    """
    if call is None or not is_built():
        return []
    made = call

    def find() -> Callable[[Inputs], Call]:
        return functools.partial(made, importlib.import_module("mmcv.ops"))

    found = side(MMCV, find, direction, **options)
    return [on_default_stream(found) if unordered else found]


def by_name(operator: str, *names: str) -> PeerCall:
    """Mmcv's operator on the inputs of these names, by position."""

    def call(ops: Any, inputs: Inputs) -> Call:
        return functools.partial(getattr(ops, operator), *(inputs[name] for name in names))

    return call


def _kept(operator: str) -> PeerCall:
    return lambda ops, i: functools.partial(
        getattr(ops, operator), i["boxes"], i["scores"], i["iou_threshold"]
    )


def _soft_nms(ops: Any, i: Inputs) -> Call:
    options = {"iou_threshold": 0.3, "min_score": i["min_score"]}
    if "idxs" not in i:
        return lambda: ops.soft_nms(i["boxes"], i["scores"], **options)
    config = {"type": "soft_nms", **options}
    return lambda: ops.batched_nms(i["boxes"], i["scores"], i["idxs"], config)


def _nms_match(ops: Any, i: Inputs) -> Call:
    def call() -> Any:
        return ops.nms_match(torch.cat([i["boxes"], i["scores"][:, None]], 1), i["iou_threshold"])

    return call


def _batched_nms(ops: Any, i: Inputs) -> Call:
    config = {"type": "nms", "iou_threshold": i["iou_threshold"], "max_num": i["max_output"]}
    return lambda: ops.batched_nms(i["boxes"], i["scores"], i["idxs"], config)


def suppression(operator: str, labelled: bool) -> PeerCall | None:
    """How mmcv's users get what one of our suppressions gives."""
    if operator in ("soft_nms", "soft_nms_padded"):
        return _soft_nms
    if operator in ("nms_groups", "nms_match"):
        return _nms_match
    if operator == "batched_nms_padded":
        return _batched_nms
    name = operator.removesuffix("_padded")
    return None if labelled else _kept(name)


def contour_expand(ops: Any, i: Inputs) -> Call:
    """Mmcv has it on the CPU only: maps are copied there first, as its users must do."""
    return lambda: ops.contour_expand(
        i["masks"].cpu(), i["labels"].cpu(), i["min_area"], i["num_labels"]
    )


def pixel_group(ops: Any, i: Inputs) -> Call:
    """As contour_expand; the background counts as a region."""
    names = ("scores", "mask", "embeddings", "labels", "contour")
    rest = i["num_labels"] + 1, i["threshold"]
    return lambda: ops.pixel_group(*(i[name].cpu() for name in names), *rest)
