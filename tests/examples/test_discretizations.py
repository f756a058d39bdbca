"""examples/discretizations: every rule trains, and the page shows what came out."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from support.machine import ROOT

FOLDER = ROOT / "examples" / "discretizations"
PAGE = ROOT / "docs" / "compat_mamba.md"
ROW = re.compile(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) % \|$", re.MULTILINE)
# Points between the best rule and the worst one.
MOST_APART = 1.5

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
sys.path.insert(0, str(FOLDER))
import train_digits as train  # noqa: E402


@pytest.mark.parametrize("rule", train.RULES)
def test_one_step_lowers_the_loss_of_its_batch(rule: str, device: str) -> None:
    images, labels, *_ = (tensor[:32].to(device) for tensor in train.digits())
    torch.manual_seed(0)
    model = train.Classifier(rule, width=8, blocks=1).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def test_the_page_shows_equal_accuracies() -> None:
    rows = {rule: float(accuracy) for rule, _, accuracy in ROW.findall(PAGE.read_text())}
    assert set(rows) == set(train.RULES)
    assert max(rows.values()) - min(rows.values()) <= MOST_APART
    assert min(rows.values()) > 90


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [[train.Run(rule, [2.0, 1.0], 0.9)] for rule in train.RULES]
    train.draw(runs, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    assert (ROOT / "docs" / "images" / "discretizations.png").exists()
