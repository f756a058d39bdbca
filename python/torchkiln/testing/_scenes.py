"""Inputs as models make them: proposals that crowd around objects, with equal scores among them.

Everything is float32 on the CPU, and the same at every run and on every machine.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# Height and width of an image, the way detectors resize it.
IMAGE = (800.0, 1344.0)
# Scores leave a network in half precision: many are equal.
SCORE_STEPS = 1024
BACKGROUND_SHARE = 0.2
# The finest level of a feature pyramid on two such images, and 512 regions of each: Faster R-CNN
# with ResNet-50 in training.
PYRAMID_LEVEL = {
    "images": 2,
    "channels": 256,
    "height": 200,
    "width": 336,
    "regions": 1024,
    "bins": 7,
    "stride": 4,
}
SEED = 20


def generator(seed: int) -> torch.Generator:
    """On the CPU, so that every machine measures the same numbers."""
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers, mean 0 and deviation 1."""
    return torch.randn(shape, generator=generator(seed))


def log_uniform(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    """As many small sizes as large ones, octave by octave."""
    return torch.exp(torch.rand(n, generator=g) * math.log(high / low) + math.log(low))


def boxes_from_centers(center: Tensor, size: Tensor, image: tuple[float, float] = IMAGE) -> Tensor:
    """(N, 4) x1, y1, x2, y2 inside the image, at least 2 pixels wide and high."""
    limit = torch.tensor([image[1], image[0]])
    low = (center - size / 2).clamp(min=0).minimum(limit - 2)
    high = (center + size / 2).minimum(limit).maximum(low + 2)
    return torch.cat([low, high], 1)


def uniform_boxes(
    n: int, seed: int, low: float = 16, high: float = 512, image: tuple[float, float] = IMAGE
) -> Tensor:
    """Boxes of anchors' sizes, anywhere."""
    g = generator(seed)
    center = torch.rand(n, 2, generator=g) * torch.tensor([image[1], image[0]])
    aspect = log_uniform(n, 0.5, 2.0, g).sqrt()
    side = log_uniform(n, low, high, g)
    return boxes_from_centers(center, torch.stack([side * aspect, side / aspect], 1), image)


def rotated_boxes(n: int, seed: int, side: float = 1024) -> Tensor:
    """(N, 5) x, y, w, h, angle on an aerial image: long, small, half of them in groups."""
    g = generator(seed)
    groups = torch.rand(max(n // 20, 1), 2, generator=g)
    near = groups[torch.randint(len(groups), (n,), generator=g)]
    near = near + 0.05 * torch.randn(n, 2, generator=g)
    anywhere = torch.rand(n, 2, generator=g)
    center = side * torch.where(torch.rand(n, 1, generator=g) < 0.5, near, anywhere)
    width = log_uniform(n, 8, 200, g)
    height = width / log_uniform(n, 1, 6, g)
    angle = math.pi * (torch.rand(n, generator=g) - 0.5)
    return torch.cat([center, torch.stack([width, height, angle], 1)], 1)


def cars(n: int, seed: int, side: float = 100) -> Tensor:
    """(N, 7) x, y, z, dx, dy, dz, angle in metres: proposals around cars along two streets."""
    g = generator(seed)
    true = side * torch.rand(max(n // 20, 1), 2, generator=g)
    center = true[torch.randint(len(true), (n,), generator=g)]
    center = center + 0.5 * torch.randn(n, 2, generator=g)
    size = torch.tensor([4.2, 1.8, 1.6]) * torch.exp(0.1 * torch.randn(n, 3, generator=g))
    z = 0.2 * torch.randn(n, 1, generator=g)
    street = math.pi / 2 * torch.randint(4, (n, 1), generator=g)
    angle = street + 0.1 * torch.randn(n, 1, generator=g)
    return torch.cat([center, z, size, angle], 1)


def quantized(scores: Tensor) -> Tensor:
    """Rounded, so that ties occur as they do after a half-precision network."""
    return (scores * SCORE_STEPS).round() / SCORE_STEPS


def uniform_scene(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Boxes anywhere with scores that know nothing of them: little is suppressed."""
    return uniform_boxes(n, seed), torch.rand(n, generator=generator(seed + 1))


def clustered_scene(n: int, seed: int, objects: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals around objects: boxes, scores with ties, the object of each (-1: background)."""
    g = generator(seed)
    true = uniform_boxes(objects, seed + 1, 24, 400)
    owner = torch.randint(objects, (n,), generator=g)
    center = (true[owner, :2] + true[owner, 2:]) / 2
    size = true[owner, 2:] - true[owner, :2]
    # Proposals are off by a tenth of the object's size, some by much more.
    error = 0.1 * log_uniform(n, 0.3, 4.0, g)[:, None]
    moved = center + size * error * torch.randn(n, 2, generator=g)
    scaled = size * torch.exp(error * torch.randn(n, 2, generator=g))
    boxes = boxes_from_centers(moved, scaled)
    quality = 1 - 2 * error[:, 0] + 0.1 * torch.randn(n, generator=g)
    background = torch.rand(n, generator=g) < BACKGROUND_SHARE
    boxes[background] = uniform_boxes(n, seed + 2)[background]
    quality[background] = -0.5 + 0.3 * torch.randn(n, generator=g)[background]
    scores = quantized(torch.sigmoid(3 * quality))
    return boxes, scores, torch.where(background, -1, owner)


def classes_of(owner: Tensor, classes: int, seed: int) -> Tensor:
    """A class for each proposal: that of its object nine times out of ten, else any."""
    g = generator(seed)
    any_class = torch.randint(classes, owner.shape, generator=g)
    of_object = torch.randint(classes, (int(owner.max()) + 1,), generator=g)[owner.clamp(min=0)]
    strays = (owner < 0) | (torch.rand(owner.shape, generator=g) < 0.1)
    return torch.where(strays, any_class, of_object)


def regions(
    n: int, images: int, seed: int, image: tuple[float, float], low: float = 32, high: float = 512
) -> Tensor:
    """(N, 5) batch index and box in image pixels, around objects, grouped by image."""
    g = generator(seed)
    objects = uniform_boxes(32 * images, seed + 1, low, high, image)
    owner = torch.randint(32, (n,), generator=g)
    batch = torch.arange(n) * images // n
    base = objects[batch * 32 + owner]
    size = base[:, 2:] - base[:, :2]
    center = (base[:, :2] + base[:, 2:]) / 2 + 0.15 * size * torch.randn(n, 2, generator=g)
    boxes = boxes_from_centers(
        center, size * torch.exp(0.2 * torch.randn(n, 2, generator=g)), image
    )
    return torch.cat([batch[:, None].float(), boxes], 1)


def pooling(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """A feature map and regions on it; sizes as in PYRAMID_LEVEL."""
    height, width, stride = sizes["height"], sizes["width"], float(sizes["stride"])
    shape = (sizes["images"], sizes["channels"], height, width)
    image = (height * stride, width * stride)
    boxes = regions(sizes["regions"], sizes["images"], SEED, image)
    return {"input": normal(shape, SEED), "boxes": boxes}


def rotated(regions: Tensor, seed: int = SEED) -> Tensor:
    """(N, 6) the same regions at any angle: centre, size, and up to half a turn either way."""
    batch, x1, y1, x2, y2 = regions.unbind(1)
    angle = math.pi * (torch.rand(len(regions), generator=generator(seed)) - 0.5)
    return torch.stack([batch, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, angle], 1)


def detector_targets(rows: int, classes: int, soft: bool = False) -> Tensor:
    """One positive row in a hundred, as in a dense detector.

    Labels, (rows,) int64 with `classes` for background; or soft targets, (rows, classes).
    """
    g = generator(SEED)
    labels = torch.randint(classes, (rows,), generator=g)
    labels[torch.rand(rows, generator=g) > 0.01] = classes
    if not soft:
        return labels
    hard = (labels[:, None] == torch.arange(classes)).float()
    return hard * (0.5 + 0.5 * torch.rand(rows, 1, generator=g))


def detector_logits(rows: int, classes: int) -> Tensor:
    """(rows, classes) with the bias that a detector starts with: nearly all is background."""
    return normal((rows, classes), SEED) - 4.6
