"""Detectors of mmdet, from its own configuration files, on torchkiln: inference, then training.

    python -m benchmarks.mmdet_training --device cuda --steps 20 --output docs/reports/mmdet

Random weights, and one generated image with two objects. Writes mmdet.json and mmdet.md: the loss
of every step, and times. mmdet, mmengine and an mmcv, mmcv-lite is enough, must be importable.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import torchkiln

MODELS = ("faster-rcnn", "mask-rcnn", "retinanet")
BOXES = ((20, 10, 70, 60), (80, 50, 150, 110))  # at 128 x 160
LABELS = (1, 5)
SMALL = (128, 160)
# Of 512 regions an image: most of a step's time on a CPU.
REGIONS = 64


@dataclass(frozen=True)
class Scene:
    """One image and what is on it, as mmdet's data pipeline would hand it over."""

    image: Tensor
    sample: Any


def build(name: str, device: torch.device) -> Any:
    """The detector of mmdet's configuration file, with random weights."""
    mmdet = importlib.import_module("mmdet")
    models = importlib.import_module("mmdet.registry").MODELS
    importlib.import_module("mmdet.models")
    importlib.import_module("mmengine.registry").init_default_scope("mmdet")
    folder = Path(str(mmdet.__file__)).parent / ".mim" / "configs" / name.replace("-", "_")
    read = importlib.import_module("mmengine.config").Config.fromfile
    config = read(folder / f"{name}_r50_fpn_1x_coco.py").model
    config.backbone.init_cfg = None  # no download
    config.data_preprocessor = None
    if "rcnn" in name:
        config.train_cfg.rcnn.sampler.num = REGIONS
    return models.build(config).to(device)


def scene(size: tuple[int, int], device: torch.device) -> Scene:
    """Two bright boxes on black, moved apart as the image is larger than 128 x 160."""
    numpy = importlib.import_module("numpy")
    bitmaps = importlib.import_module("mmdet.structures.mask").BitmapMasks
    structures = importlib.import_module("mmengine.structures")
    factors = [side / small for side, small in zip(size[::-1] * 2, SMALL[::-1] * 2, strict=True)]
    boxes = [[int(x * factor) for x, factor in zip(box, factors, strict=True)] for box in BOXES]
    masks = numpy.zeros((len(boxes), *size), numpy.uint8)
    image = torch.zeros(1, 3, *size)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        masks[i, y1:y2, x1:x2] = 1
        image[0, i, y1:y2, x1:x2] = 1
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    sample = importlib.import_module("mmdet.structures").DetDataSample(
        metainfo={**shapes, "scale_factor": (1.0, 1.0)}
    )
    sample.gt_instances = structures.InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32, device=device),
        labels=torch.tensor(LABELS, device=device),
        masks=bitmaps(masks, *size),
    )
    return Scene(image.to(device), sample)


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its milliseconds until the device has done it."""
    begin = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, 1e3 * (time.perf_counter() - begin)


def train(model: Any, data: Scene, steps: int, device: torch.device) -> tuple[list[float], ...]:
    """Losses and milliseconds of every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9)

    def step() -> float:
        losses = model.loss(data.image, [data.sample])
        parts = [value for name, value in losses.items() if "loss" in name]
        flat = [part for value in parts for part in (value if isinstance(value, list) else [value])]
        total = torch.stack([part.sum() for part in flat]).sum()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        return float(total)

    model.train()
    results = [timed(device, step) for _ in range(steps)]
    return [loss for loss, _ in results], [took for _, took in results]


def run(name: str, size: tuple[int, int], steps: int, device: torch.device) -> dict[str, Any]:
    """Inference and training of one detector."""
    torch.manual_seed(0)
    model, data = build(name, device), scene(size, device)
    model.eval()

    def predict() -> Any:
        with torch.no_grad():
            return model.predict(data.image, [data.sample])[0].pred_instances

    found, first = timed(device, predict)
    if found.bboxes.shape != (len(found.scores), 4):
        raise RuntimeError(f"{name}: has boxes {tuple(found.bboxes.shape)} for its scores")
    again = [timed(device, predict)[1] for _ in range(3)]
    losses, took = train(model, data, steps, device)
    return {
        "detections": len(found.scores),
        "first_inference_ms": first,
        "inference_ms": statistics.median(again),
        "losses": losses,
        "first_step_ms": took[0],
        "step_ms": statistics.median(took[1:] or took),
    }


def facts(device: torch.device) -> dict[str, str]:
    """What the numbers belong to."""
    versions = {
        name: str(importlib.import_module(name).__version__)
        for name in ("torch", "torchkiln", "mmdet", "mmcv", "mmengine")
    }
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    return {**versions, "python": platform.python_version(), "device": where}


def page(data: dict[str, Any]) -> str:
    """The report as Markdown."""
    about = ", ".join(f"{name} {value}" for name, value in data["facts"].items())
    height, width = data["size"]
    lines = [
        "# Detectors of mmdet on torchkiln",
        "",
        f"From mmdet's own configuration files, random weights, one generated image of {height} x "
        f"{width}; `torchkiln.compat.mmdet.install()` before. {about}.",
        "",
        "| detector | first inference, ms | inference, ms | first step, ms | step, ms "
        "| first loss | last loss | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in data["models"].items():
        times = (row[key] for key in _TIMES)
        first, last = row["losses"][0], row["losses"][-1]
        cells = [name, *(f"{ms:.1f}" for ms in times), f"{first:.3f}", f"{last:.3f}"]
        lines.append(f"| {' | '.join([*cells, str(len(row['losses']))])} |")
    lines += ["", "Loss of every step:", ""]
    for name, row in data["models"].items():
        lines.append(f"- {name}: {', '.join(f'{loss:.3f}' for loss in row['losses'])}")
    return "\n".join(lines) + "\n"


_TIMES = ("first_inference_ms", "inference_ms", "first_step_ms", "step_ms")


@click.command()
@click.option("--device", "name", default="cuda", show_default=True)
@click.option("--steps", default=20, show_default=True, type=click.IntRange(min=1))
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), help="All if none.")
@click.option("--size", default=SMALL, nargs=2, type=click.IntRange(min=64), show_default=True)
@click.option("--threads", default=0, help="Of the CPU; 0 for torch's choice.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Without a suffix.")
def main(
    name: str,
    steps: int,
    models: tuple[str, ...],
    size: tuple[int, int],
    threads: int,
    output: Path,
) -> None:
    """Runs the detectors and writes OUTPUT.json and OUTPUT.md."""
    if threads > 0:
        torch.set_num_threads(threads)
    torchkiln.compat.mmdet.install()
    device = torch.device(name)
    results: dict[str, Any] = {}
    for model in models or MODELS:
        results[model] = run(model, size, steps, device)
        losses = results[model]["losses"]
        click.echo(f"{model}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    data = {"facts": facts(device), "size": size, "models": results}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    output.with_suffix(".md").write_text(page(data))


if __name__ == "__main__":
    main()
