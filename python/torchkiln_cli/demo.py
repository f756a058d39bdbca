"""`torchkiln demo`: a pretrained face detector, unmodified, on a real photograph.

The detector is MTCNN of facenet-pytorch, whose weights are in its wheel, with our kernels behind
`torchvision.ops`; the photograph is in scikit-image's wheel. Then the demo's operators are compiled
for GPUs that need not be here. Nothing is downloaded.
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchkiln_cli import _native
from torchkiln_cli._output import emit_json
from torchkiln_cli.warm import Selection, UsageError, emit_failures, emit_kernel_table, warm

if TYPE_CHECKING:
    from PIL import Image

# What runs behind the detector's calls of torchvision.ops.
_OPERATORS = ("nms",)
_DTYPES = ("float32",)
# Import name -> what pip calls it.
_PACKAGES = {
    "torchvision": "torchvision",
    "facenet_pytorch": "facenet-pytorch",
    "skimage": "scikit-image",
    "numpy": "numpy",
    "PIL": "pillow",
    "requests": "requests",
    "tqdm": "tqdm",
}
# They pin a torch, or bring what is not needed here.
_WITHOUT_DEPENDENCIES = ("torchvision", "facenet-pytorch", "scikit-image")
_SMALLEST_FACE = 20  # pixels a side: the detector's default
_COLOUR = (118, 255, 3)


@dataclass(frozen=True)
class Face:
    """A detection, in pixels of the photograph."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    score: float
    landmarks: tuple[tuple[float, float], ...]  # eyes, nose, corners of the mouth


@dataclass(frozen=True)
class Detection:
    """What the detector found, where it ran, and which kernel answered it."""

    faces: tuple[Face, ...]
    device: str
    torchvision: str
    healthy: bool  # torchvision's own library could be loaded
    nms_calls: int  # of torchvision::nms that our kernel answered


def run(image: str | None, output: str, architectures: list[str], as_json: bool) -> bool:
    """Runs the whole demo; True when every kernel was compiled.

    Raises:
        UsageError: a package is missing, or an image cannot be read or written.
    """
    _require_packages(image)
    _native.load_operators()
    path = Path(image) if image is not None else photograph()
    picture = _open(path)
    detection = detect(picture)
    _save(draw(picture, detection.faces), output)
    if not as_json:
        _tell(path, detection, output)
    outcome = warm(Selection(operators=_OPERATORS, dtypes=_DTYPES), architectures)
    if as_json:
        emit_json(
            {
                "image": str(path),
                "output": output,
                "device": detection.device,
                "torchvision": {"version": detection.torchvision, "healthy": detection.healthy},
                "nms_calls": detection.nms_calls,
                "faces": [
                    {"box": face.box, "score": face.score, "landmarks": face.landmarks}
                    for face in detection.faces
                ],
                "kernels": [
                    {
                        **row.to_json(),
                        "operator": row.operator,
                        "compile_milliseconds": row.compile_milliseconds,
                        "registers": row.registers,
                        "bytes": row.bytes,
                    }
                    for row in outcome.rows
                ],
            }
        )
    else:
        click.echo()
        emit_kernel_table(outcome)
        emit_failures(outcome)
    return outcome.complete


def photograph() -> Path:
    """The photograph in scikit-image's data folder, found without importing it."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "data" / "astronaut.png"


def detect(picture: Image.Image) -> Detection:
    """Finds faces with MTCNN, on the GPU where there is one."""
    import torch

    from torchkiln.compat import torchvision as drop_in

    healthy = drop_in.is_healthy()
    drop_in.install()
    try:
        torchvision = importlib.import_module("torchvision")
        facenet = importlib.import_module("facenet_pytorch")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        before = drop_in.calls()["nms"]
        detector = facenet.MTCNN(keep_all=True, device=torch.device(device))
        boxes, scores, landmarks = detector.detect(picture, landmarks=True)
        answered = drop_in.calls()["nms"] - before
    finally:
        drop_in.uninstall()
    found = [] if boxes is None else zip(boxes, scores, landmarks, strict=True)
    return Detection(
        faces=tuple(_face(*each) for each in found),
        device=device,
        torchvision=torchvision.__version__,
        healthy=healthy,
        nms_calls=answered,
    )


def draw(picture: Image.Image, faces: tuple[Face, ...]) -> Image.Image:
    """The photograph with a box, a score and five landmarks for each face."""
    from PIL import ImageDraw, ImageFont

    result = picture.copy()
    canvas = ImageDraw.Draw(result)
    line = max(2, max(result.size) // 200)
    font = ImageFont.load_default(size=7 * line)
    for face in faces:
        x1, y1, x2, y2 = face.box
        canvas.rectangle((x1, y1, x2, y2), outline=_COLOUR, width=line)
        for x, y in face.landmarks:
            canvas.ellipse((x - line, y - line, x + line, y + line), fill=_COLOUR)
        label = f"{face.score:.4f}"
        left, top, right, bottom = canvas.textbbox((x1, y1 - line), label, font=font, anchor="lb")
        canvas.rectangle((left - line, top - line, right + line, bottom + line), fill=_COLOUR)
        canvas.text((x1, y1 - line), label, font=font, anchor="lb", fill=(0, 0, 0))
    return result


def _require_packages(image: str | None) -> None:
    wanted = dict(_PACKAGES)
    if image is not None:
        del wanted["skimage"]
    missing = [name for module, name in wanted.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    alone = [name for name in missing if name in _WITHOUT_DEPENDENCIES]
    others = [name for name in missing if name not in _WITHOUT_DEPENDENCIES]
    lines = [
        f"pip install {option}{' '.join(names)}"
        for option, names in (("--no-deps ", alone), ("", others))
        if names
    ]
    raise UsageError(f"The demo needs {', '.join(missing)}. Run: {' && '.join(lines)}")


def _open(path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            picture: Image.Image = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"--image must be a picture that Pillow can read; got {path}") from error
    if min(picture.size) < _SMALLEST_FACE:
        size = f"{picture.width} x {picture.height}"
        raise UsageError(f"--image must have {_SMALLEST_FACE} pixels a side or more; got {size}")
    return picture


def _save(picture: Image.Image, output: str) -> None:
    try:
        picture.save(output)
    except (OSError, ValueError) as error:
        raise UsageError(f"--output must be a picture that can be written; got {output}") from error


def _face(box: Any, score: Any, landmarks: Any) -> Face:
    x1, y1, x2, y2 = (float(value) for value in box)
    points = tuple((float(x), float(y)) for x, y in landmarks)
    return Face((x1, y1, x2, y2), float(score), points)


def _tell(path: Path, detection: Detection, output: str) -> None:
    where = "the GPU" if detection.device == "cuda" else "the CPU"
    click.echo(f"MTCNN on {path.name}, on {where}: {len(detection.faces)} face(s)")
    for face in detection.faces:
        box = ", ".join(f"{value:.0f}" for value in face.box)
        click.echo(f"  box ({box}), score {face.score:.4f}")
    state = "healthy" if detection.healthy else "cannot load its own library here"
    click.echo(f"torchvision {detection.torchvision} ({state})")
    click.echo(f"torchvision::nms was answered by torchkiln: {detection.nms_calls} calls")
    click.echo(f"Wrote {output}")
