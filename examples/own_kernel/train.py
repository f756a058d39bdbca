"""Trains a small network on handwritten digits with the operator, and again with plain PyTorch.

Both see the same batches and the same dropout masks, so that their losses must be the same, on the
CPU and on a GPU. Needs scikit-learn, for the digits.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from bias_gelu import bias_gelu
from torch import Tensor
from torch.nn import functional

import torchkiln

Activation = Callable[[Tensor, Tensor, Tensor, float], Tensor]

HIDDEN, BATCH, KEPT = 256, 128, 0.8
# Of a loss. Two runs in float32 drift apart by rounding, step by step.
TOLERANCE = 1e-4


def digits() -> tuple[Tensor, Tensor]:
    """1797 images of 8 x 8 pixels, and what they show."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        sys.exit("train: scikit-learn must be installed; found none. pip install scikit-learn")
    data = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)


def plain_bias_gelu(x: Tensor, bias: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same in four operators of PyTorch."""
    return functional.gelu(x + bias) * mask * scale


def train(activation: Activation, device: str, steps: int) -> tuple[list[float], float]:
    """Returns the loss of each step, and the share of unseen digits that are read rightly."""
    images, labels = digits()
    seen = len(images) * 4 // 5
    new = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, HIDDEN, generator=new) / 8, torch.zeros(HIDDEN)]
    weights += [torch.randn(HIDDEN, 10, generator=new) / 16, torch.zeros(10)]
    w1, b1, w2, b2 = weights = [w.to(device).requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)

    def logits(x: Tensor, mask: Tensor, scale: float) -> Tensor:
        return activation(x.to(device) @ w1, b1, mask.to(device), scale) @ w2 + b2

    losses = []
    for _ in range(steps):
        batch = torch.randint(seen, (BATCH,), generator=new)
        mask = (torch.rand(BATCH, HIDDEN, generator=new) < KEPT).to(torch.uint8)
        predicted = logits(images[batch], mask, 1 / KEPT)
        loss = functional.cross_entropy(predicted, labels[batch].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        everything = torch.ones(len(images) - seen, HIDDEN, dtype=torch.uint8)
        read = logits(images[seen:], everything, 1.0).argmax(1).cpu()
    return losses, float((read == labels[seen:]).float().mean())


def compare(devices: list[str], steps: int, tune: bool) -> list[dict[str, Any]]:
    """Trains on each device with both activations; all against plain PyTorch on the CPU."""
    expected, _ = train(plain_bias_gelu, "cpu", steps)
    rows = []
    for device in devices:
        if tune and device == "cuda":
            # The first call with these sizes measures; later ones find what won.
            with torchkiln.autotune(budget_ms=300):
                train(bias_gelu, device, 1)
        for name, activation in (("torchkiln", bias_gelu), ("plain", plain_bias_gelu)):
            losses, accuracy = train(activation, device, steps)
            pairs = zip(losses, expected, strict=True)
            difference = max(abs(loss - right) / right for loss, right in pairs)
            row = {"device": device, "activation": name, "losses": losses, "accuracy": accuracy}
            rows.append(row | {"difference": difference, "ok": difference <= TOLERANCE})
    return rows


def main() -> int:
    """Trains and prints; 1 when losses differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="by default all there are")
    parser.add_argument("--tune", action="store_true", help="tune the kernels first, on a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the network is too small for more of them to help
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = compare([options.device] if options.device else devices, options.steps, options.tune)
    if options.json:
        print(json.dumps({"steps": options.steps, "tolerance": TOLERANCE, "runs": rows}))
    for row in () if options.json else rows:
        print(
            f"{row['device']:4} {row['activation']:9}  loss {row['losses'][0]:.3f} to "
            f"{row['losses'][-1]:.4f}, at most {row['difference']:.1e} from plain PyTorch on the "
            f"CPU; reads {row['accuracy']:.1%} of unseen digits{'' if row['ok'] else '  FAILED'}"
        )
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
