"""Trains a small bidirectional scan classifier on handwritten digits, once by each discretization.

The images are scikit-learn's, 1797 of 8 x 8 pixels: 16 patches of 2 x 2 are read as a sequence from
both ends. All runs start from the same weights and see the same batches.

    python examples/discretizations/train_digits.py --picture docs/images/discretizations.png
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from torchkiln.nn import BidirectionalMamba

RULES = (
    "mamba",
    "zoh",
    "foh",
    "bilinear",
    "tustin",
    "poly",
    "highorder",
    "rk4",
    "rk4_constant",
)
BATCH = 64
CLASSES = 10


class Classifier(nn.Module):
    """Patches, two bidirectional blocks, the mean of all positions."""

    def __init__(self, rule: str, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.blocks = nn.ModuleList(
            BidirectionalMamba(width, d_state=8, discretization_method=rule) for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Returns (B, 10) for (B, 8, 8)."""
        patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3)
        x = self.embed(patches.flatten(1, 2).flatten(2)) + self.place
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        logits: Tensor = self.head(x.mean(1))
        return logits


@dataclass(frozen=True)
class Run:
    """What one training gives: a loss for each epoch, and the share of right answers at the end."""

    rule: str
    losses: list[float]
    accuracy: float


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images from 0 to 1 and labels: half of them to learn from, the others to judge by."""
    data = load_digits()
    images = torch.from_numpy(data.images).float() / 16
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    count = len(images) // 2
    return images[:count], labels[:count], images[count:], labels[count:]


def train(rule: str, epochs: int, seed: int = 0, device: str = "cpu") -> Run:
    """Trains with AdamW and a rate that rises and then falls to 0."""
    torch.set_num_threads(1)  # the model is too small for more
    images, labels, test_images, test_labels = (tensor.to(device) for tensor in digits())
    torch.manual_seed(seed)
    model = Classifier(rule).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, epochs * batches)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)[: batches * BATCH].to(device)
        for batch in order.split(BATCH):
            loss = functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / batches)
    with torch.no_grad():
        right = model(test_images).argmax(1) == test_labels
    return Run(rule, losses, right.float().mean().item())


def draw(runs: Sequence[Sequence[Run]], path: Path) -> None:
    """Loss curves of each rule, the mean of its runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for of_rule, style in zip(runs, 3 * ("-", "--", ":"), strict=False):
        losses = torch.tensor([run.losses for run in of_rule]).mean(0)
        accuracy = sum(run.accuracy for run in of_rule) / len(of_rule)
        label = f"{of_rule[0].rule}  {100 * accuracy:.1f} %"
        axes.plot(range(1, len(losses) + 1), losses, style, label=label)
    axes.set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes.set_title("Digits by a bidirectional scan: loss, and accuracy on images not seen")
    axes.legend(ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains by every rule and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [
            [
                pool.submit(train, rule, options.epochs, seed, options.device)
                for seed in range(options.seeds)
            ]
            for rule in options.rules
        ]
        print("| rule | loss at the end | accuracy |")
        print("|---|---|---|")
        runs = []
        for of_rule in futures:
            done = [future.result() for future in of_rule]
            loss = sum(run.losses[-1] for run in done) / len(done)
            accuracy = sum(run.accuracy for run in done) / len(done)
            row = f"| `{done[0].rule}` | {loss:.4f} | {100 * accuracy:.2f} % |"
            print(row, flush=True)
            runs.append(done)
    if options.picture:
        draw(runs, options.picture)


if __name__ == "__main__":
    main()
