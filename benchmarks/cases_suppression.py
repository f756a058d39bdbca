"""Rows of soft suppression, groups, and suppression of rotated boxes, boxes in space and lanes.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.cases import (
    F32,
    FORWARD,
    MMCV,
    OURS,
    PARITIES,
    Baseline,
    Case,
    Target,
    name_of,
    ours,
    side,
)
from benchmarks.harness import Inputs, Work
from benchmarks.mmcv_sides import mmcv_sides, suppression

# Above it the reference, one box after the other, takes minutes.
MOST_CHECKED = 5000


def row(
    op: str,
    workload: str,
    sizes: dict[str, int],
    function: str = "",
    dtype: torch.dtype = F32,
    **options: Any,
) -> Case:
    """One of an operator's workloads, in any size. What is not padded waits for its size."""
    name = function or op
    is_sized = not (name.endswith("_padded") or name == "nms_groups")
    # mmcv keeps rows, scores and lists where we keep indices, so nothing of it is compared here.
    peer = suppression(name, labelled="classes" in sizes and not name.startswith("soft_nms"))

    def arguments(device: torch.device) -> Inputs:
        (found,) = (w for w in PARITIES[op].workloads if w.name == workload)
        return dict(found.arguments(sizes, dtype, "contiguous", device))

    def bind(find: Callable[[], Callable[..., Any]]) -> Callable[[Inputs], Any]:
        return lambda inputs: partial(find(), **inputs)

    def answer(inputs: Inputs) -> Any:
        from torchkiln import backend

        with backend("reference"):
            return ours(name)(**inputs)

    def make(device: torch.device) -> Work:
        return Work(
            arguments(device),
            [
                side(OURS, lambda: bind(lambda: ours(name)), synchronises=is_sized),
                *mmcv_sides(peer, synchronises=True, compared=False),
            ],
            oracle=answer if sizes["boxes"] <= MOST_CHECKED else None,
        )

    size = ", ".join(f"{value} {key}" for key, value in sizes.items())
    return Case(name, size, name_of(dtype), FORWARD, make, data=workload, **options)


def suppression_rows() -> Iterator[Case]:
    """The issue's sizes, then others."""
    # mmcv's soft_nms leaves the GPU, and takes 80 classes one after the other.
    of_class = (Baseline(MMCV, 975.1),)
    of_classes = (Baseline(MMCV, 80 * 975.1),)
    one, all_classes = (Target("baseline", 3, 6, MMCV),), (Target("baseline", 20, 60, MMCV),)
    classes = {"boxes": 40_000, "classes": 80}
    yield row("soft_nms", "class", {"boxes": 500}, targets=one, baselines=of_class, quick=True)
    yield row("soft_nms", "classes", classes, targets=all_classes, baselines=of_classes, quick=True)
    shown = {**classes, "most": 100}
    yield row(
        "soft_nms", "shown", shown, "soft_nms_padded", targets=all_classes, baselines=of_classes
    )
    yield row("soft_nms", "large", {"boxes": 4000})
    goal = (Target("baseline", 5, 10, MMCV),)
    yield row(
        "nms_rotated",
        "image",
        {"boxes": 2000},
        targets=goal,
        baselines=(Baseline(MMCV, 670.0),),
        quick=True,
    )
    yield row("nms_rotated", "padded", {"boxes": 2000, "most": 500}, "nms_rotated_padded")
    yield row("nms_rotated", "many", {"boxes": 10_000, "classes": 15})
    yield row("nms_quadri", "image", {"boxes": 2000}, quick=True)
    yield row(
        "nms3d",
        "image",
        {"boxes": 1000},
        targets=goal,
        baselines=(Baseline(MMCV, 652.7),),
        quick=True,
    )
    yield row("nms3d", "image", {"boxes": 4096})
    yield row("nms3d_normal", "image", {"boxes": 4096})
    yield row("nms_bev", "street", {"boxes": 1000}, quick=True)
    yield row("nms_bev_padded", "padded", {"boxes": 1000, "most": 500})
    yield row("nms_normal_bev", "street", {"boxes": 1000})
    yield row("nms_normal_bev_padded", "padded", {"boxes": 1000, "most": 500})
    classified = {"boxes": 10_000, "classes": 80, "most": 300}
    yield row("batched_nms_padded", "padded", classified)
    yield row("nms_groups", "proposals", {"boxes": 4000}, quick=True)
    yield row("nms_match", "proposals", {"boxes": 4000})
    yield row("line_nms", "lanes", {"boxes": 1000}, quick=True)
    yield row("line_nms", "padded", {"boxes": 1000, "most": 10}, "line_nms_padded", quick=True)
    yield row("line_nms", "lanes", {"boxes": 192})


def cpu_rows(threads: int) -> Iterator[Case]:
    """On the CPU; no peer stands beside them."""
    options: dict[str, Any] = {"device": "cpu", "threads": threads, "quick": True}
    yield row("soft_nms", "class", {"boxes": 500}, **options)
    yield row("soft_nms", "classes", {"boxes": 40_000, "classes": 80}, **options)
    yield row("nms_rotated", "image", {"boxes": 2000}, **options)
    yield row("nms3d", "image", {"boxes": 1000}, **options)
    yield row("nms_groups", "proposals", {"boxes": 4000}, **options)
    yield row("line_nms", "lanes", {"boxes": 1000}, **options)


def tiny_rows() -> Iterator[Case]:
    """Every operator once, small."""
    options: dict[str, Any] = {"device": "cpu", "quick": True}
    yield row("soft_nms", "class", {"boxes": 60}, **options)
    shown = {"boxes": 60, "classes": 3, "most": 9}
    yield row("soft_nms", "shown", shown, "soft_nms_padded", **options)
    yield row("nms_rotated", "image", {"boxes": 60}, **options)
    yield row("nms_quadri", "image", {"boxes": 60}, **options)
    yield row("nms3d", "image", {"boxes": 60}, **options)
    yield row("nms3d_normal", "image", {"boxes": 60}, **options)
    yield row("nms_bev", "street", {"boxes": 60}, **options)
    yield row("nms_bev_padded", "padded", {"boxes": 60, "most": 9}, **options)
    yield row("nms_normal_bev", "street", {"boxes": 60}, **options)
    yield row("nms_normal_bev_padded", "padded", {"boxes": 60, "most": 9}, **options)
    yield row("batched_nms_padded", "padded", shown, **options)
    yield row("nms_groups", "proposals", {"boxes": 60}, **options)
    yield row("nms_match", "proposals", {"boxes": 60}, **options)
    yield row("line_nms", "lanes", {"boxes": 60}, **options)
    yield row("line_nms", "padded", {"boxes": 60, "most": 9}, "line_nms_padded", **options)


GPU_TABLES = (suppression_rows,)
