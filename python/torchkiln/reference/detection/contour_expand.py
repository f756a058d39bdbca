"""contour_expand in plain Python: a queue of pixels."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from torchkiln.testing import Case, Draw, Inputs, Parity, Sizes, Workload
from torchkiln.testing import _scenes as scenes

__all__ = ["contour_expand"]


def flood(
    rows: list[list[int]],
    sources: list[tuple[int, int]],
    may_join: Callable[[int, int, int], bool],
) -> None:
    """Labels the neighbours of the sources, then theirs, first come, first served.

    Args:
        rows: labels, changed in place; 0 is free.
        sources: labelled pixels (y, x) in the order of the queue.
        may_join: of a label and a free pixel (y, x).
    """
    queue = deque(sources)
    while queue:
        y, x = queue.popleft()
        for to_y, to_x in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if not (0 <= to_y < len(rows) and 0 <= to_x < len(rows[0])):
                continue
            if rows[to_y][to_x] == 0 and may_join(rows[y][x], to_y, to_x):
                rows[to_y][to_x] = rows[y][x]
                queue.append((to_y, to_x))


def labelled(rows: list[list[int]]) -> list[tuple[int, int]]:
    """The labelled pixels, row by row."""
    return [(y, x) for y, row in enumerate(rows) for x, label in enumerate(row) if label]


def as_labels(rows: list[list[int]], like: Tensor) -> Tensor:
    """Rows as a tensor."""
    return torch.tensor(rows, dtype=torch.int32, device=like.device).reshape(like.shape)


def contour_expand(masks: Tensor, labels: Tensor, min_area: int, num_labels: int) -> Tensor:
    """Lets labels grow through the masks K - 2, ..., 0.

    Args:
        masks: (K, H, W).
        labels: (H, W).
        min_area: labels with fewer pixels are dropped.
        num_labels: the largest label; larger ones are background.

    Returns:
        (H, W) int32.
    """
    areas = torch.bincount(labels.flatten().clamp(min=0), minlength=num_labels + 1)
    keep = (labels > 0) & (labels <= num_labels) & (areas[labels.clamp(min=0).long()] >= min_area)
    rows = torch.where(keep, labels, 0).tolist()
    for mask in reversed(masks[:-1].tolist()):

        def is_free(label: int, y: int, x: int, mask: list[list[int]] = mask) -> bool:
            return bool(mask[y][x])

        flood(rows, labelled(rows), is_free)
    return as_labels(rows, labels)


def parity() -> Parity:
    """What contour_expand is tried on."""
    return Parity(
        op="contour_expand",
        tier="X",
        fuzz=_fuzz,
        dtypes=(torch.float32,),
        cases=(
            Case("typical", functools.partial(_problem, 5, 23, 31)),
            Case("one_mask", functools.partial(_problem, 1, 9, 9)),
            Case("two_masks", functools.partial(_problem, 2, 40, 7)),
            Case("small_kernels", functools.partial(_problem, 3, 23, 31, min_area=6)),
            Case("no_labels", functools.partial(_problem, 3, 9, 9, labels=0)),
            Case("ties", _ties),
            Case("snake", _snake),
            # A kernel reaches in a later round what an earlier one closed off from it.
            Case("rounds", _rounds),
            # More than a block of the GPU at one distance.
            Case("large", functools.partial(_problem, 4, 150, 160)),
            Case("single", functools.partial(_problem, 2, 1, 1)),
            Case("empty", functools.partial(_problem, 2, 0, 5)),
        ),
        workloads=(
            # PSENet's maps of an image of 736 x 736.
            Workload("psenet", {"masks": 7, "height": 736, "width": 736, "texts": 60}, _texts),
        ),
    )


def _problem(
    masks: int, height: int, width: int, new: Inputs, min_area: int = 0, labels: int = 6
) -> dict[str, object]:
    """Random blobs: every mask holds the one after it, and they are full of holes."""
    noise = new.uniform(height, width)
    steps = torch.linspace(0.9, 0.35, masks, dtype=torch.float64)
    planes = noise < steps[:, None, None]
    numbers = new.integers(height, width, high=labels + 1)
    # Blocks of four pixels have one number.
    numbers = numbers.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width]
    kernels = torch.where(planes[-1] & (new.uniform(height, width) < 0.4), numbers, 0)
    return _arguments(planes, kernels, min_area, labels)


def _arguments(
    masks: Tensor, labels: Tensor, min_area: int = 0, num_labels: int = 9
) -> dict[str, object]:
    return {
        "masks": masks.to(torch.uint8),
        "labels": labels.int(),
        "min_area": min_area,
        "num_labels": num_labels,
    }


def _ties(new: Inputs) -> dict[str, object]:
    """Sources at equal distances, of higher numbers first."""
    labels = torch.zeros(15, 15)
    labels[::7, ::7] = torch.arange(9, 0, -1).reshape(3, 3)
    return _arguments(torch.ones(3, 15, 15), labels)


def _snake(new: Inputs) -> dict[str, object]:
    """One way through the image, with a label at each end."""
    mask = torch.ones(15, 12)
    mask[1::4, :-1] = mask[3::4, 1:] = 0
    labels = torch.zeros(15, 12)
    labels[0, 0], labels[14, 0] = 2, 1
    return _arguments(torch.stack([mask, mask]), labels)


def _rounds(new: Inputs) -> dict[str, object]:
    rows = ["1...2", "1.#.2", "..#..", "....."]
    inner = torch.tensor([[1, 0, 0, 1, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    outer = torch.tensor([[cell != "#" for cell in row] for row in rows])
    labels = torch.tensor([[int(cell) if cell.isdigit() else 0 for cell in row] for row in rows])
    return _arguments(torch.stack([outer, inner, inner, inner]), labels)


def text_maps(sizes: Sizes, masks: int) -> tuple[Tensor, Tensor]:
    """(masks, H, W) shrunken rectangles of text, largest first, and (H, W) labels of the last."""
    height, width = sizes["height"], sizes["width"]
    boxes = scenes.uniform_boxes(sizes["texts"], scenes.SEED, 24, 120, (height, width))
    planes = torch.zeros(masks, height, width, dtype=torch.uint8)
    labels = torch.zeros(height, width, dtype=torch.int32)
    for number, (x1, y1, x2, y2) in enumerate(boxes.int().tolist(), start=1):
        for i in range(masks):
            # The last mask is half as wide and high as the first one.
            dx, dy = (x2 - x1) * i // (4 * masks), (y2 - y1) * i // (4 * masks)
            planes[i, y1 + dy : y2 - dy, x1 + dx : x2 - dx] = 1
        labels[y1 + dy : y2 - dy, x1 + dx : x2 - dx] = number
    return planes, labels


def _texts(sizes: Sizes) -> dict[str, object]:
    masks, labels = text_maps(sizes, sizes["masks"])
    return _arguments(masks, labels, min_area=5, num_labels=sizes["texts"])


def _fuzz(draw: Draw) -> dict[str, object]:
    masks, labels = draw.option("masks", 1, 2, 5), draw.size(6)
    area = draw.pick(0, 3, 9)
    return _problem(masks, draw.size(16), draw.size(16), draw, min_area=area, labels=labels)
