"""A service in miniature: the second half of a detector, once at start and then for each request.

Without a GPU it runs on the CPU, where nothing is ever compiled.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

import torch

import torchkiln
from torchkiln import _control
from torchkiln.ops import batched_nms, roi_align


@torch.no_grad()
def detect(
    features: torch.Tensor, boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Keeps the best boxes of each class and pools their features."""
    kept = batched_nms(boxes, scores, classes, 0.5)[:100]
    regions = torch.cat([torch.zeros_like(boxes[kept, :1]), boxes[kept]], dim=1)
    return roi_align(features, regions, 7, spatial_scale=1 / 8, sampling_ratio=2, aligned=True)


def request(device: str) -> tuple[torch.Tensor, ...]:
    """What a request brings: a feature map, and boxes with scores and classes."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(1000, 2, generator=generator) * 400
    boxes = torch.cat([corners, corners + 8 + torch.rand(1000, 2, generator=generator) * 80], dim=1)
    scores = torch.rand(1000, generator=generator)
    classes = torch.randint(0, 20, (1000,), generator=generator)
    features = torch.rand(1, 64, 64, 64, generator=generator)
    return tuple(tensor.to(device) for tensor in (features, boxes, scores, classes))


def main() -> None:
    """Answers one request and tells what the engine had to do for it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pooled = detect(*request(device))
    expected = detect(*request("cpu"))
    torch.testing.assert_close(pooled.cpu(), expected, rtol=1e-4, atol=1e-4)
    # From here on a launch that would compile is an error, whatever TORCHKILN_JIT says.
    torchkiln.seal()
    detect(*request(device))
    print(json.dumps({"device": device, **_control.control("statistics")}))


if __name__ == "__main__":
    main()
