"""Random arguments for fuzzing: an operator's `fuzz` builds each call from one `Draw`."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchkiln.testing._cases import Arguments, Inputs

T = TypeVar("T")

# What the values of a call are like, and how often.
#   plain: random, nothing equal; only here gradients are compared.
#   grid: small multiples of a half: equal boxes and scores, no size, exchanged corners, borders
#       that touch.
#   special: NaN and infinities among them.
#   scaled: very large or very small, but no product of two passes the range; denormal ones too.
#   beyond: up to the end of the dtype. What overflows has no right result: the call must only end.
KINDS = {"plain": 8, "grid": 5, "special": 3, "scaled": 3, "beyond": 1}
# Powers of two that values are multiplied by, so that a product of two stays inside the range of
# the dtype that half types are computed in; for float64 a product of four.
_SCALES = {torch.float16: 8, torch.float64: 200}
_USUAL_SCALE = 50


class Draw(Inputs):
    """The random source of one call. Tensors are float64 on the CPU, as in `Inputs`.

    What a kernel is specialised for is drawn by `option`, which knows only the configuration: calls
    of the same configuration compile nothing new. Whatever else is drawn differs from call to call.

    Args:
        call: names the call; the same one draws the same.
        configuration: names the configuration.
        functions: of the operator.
        dtypes: of the operator.
        device: type of device that the call will run on.

    Attributes:
        function: the public function to be called.
        dtype: what floating tensors will be rounded to.
        kind: a key of KINDS.
        device: type of device.
        promised: what the call must raise; None: it must return.
        is_judged: whether the result is compared with the reference; see `undefined`.
        distinct: names of arguments whose rows no layout may repeat.
    """

    def __init__(
        self,
        call: str,
        configuration: str,
        functions: Sequence[str],
        dtypes: Sequence[torch.dtype],
        device: str = "cpu",
    ) -> None:
        self._random = random.Random(call)
        self._configuration = configuration
        super().__init__(self._random.getrandbits(63))
        self.function = self.option("function", *functions)
        self.dtype = self.option("dtype", *dtypes)
        self.kind = self._random.choices(list(KINDS), list(KINDS.values()))[0]
        self.device = device
        self.promised: type[Exception] | None = None
        self.is_judged = self.kind != "beyond"
        self.distinct: set[str] = set()
        self._unsure: list[Callable[[Arguments], bool]] = []

    # ---- choices ----

    def option(self, name: str, *choices: T) -> T:
        """One of the choices, the same one for all calls of a configuration; names are unique."""
        return random.Random(f"{self._configuration}/{name}").choice(choices)

    def pick(self, *choices: T) -> T:
        """One of the choices."""
        return self._random.choice(choices)

    def number(self, low: float, high: float) -> float:
        """Uniform."""
        return self._random.uniform(low, high)

    def chance(self, share: float) -> bool:
        """True in this share of the calls."""
        return self._random.random() < share

    def size(self, most: int = 12, least: int = 0) -> int:
        """Up to `most`, often `least` and 1, and now and then up to 8 times as much."""
        top = self._random.choices((least, 1, most, 8 * most), (2, 2, 15, 1))[0]
        return max(least, top if top < 2 else self._random.randint(2, max(top, 2)))

    def promise(self, error: type[Exception]) -> None:
        """Says that the call must raise this, with a sentence."""
        self.promised = error

    def undefined(self, *kinds: str, where: Callable[[Arguments], bool] | None = None) -> None:
        """Says that the operator promises no value for these kinds: the call must only end.

        Args:
            kinds: keys of KINDS.
            where: for which arguments, as the call has them at last: one that was made wrong may
                be right, and mean something else. None: for all.
        """
        if self.kind in kinds:
            self._unsure.append(where or (lambda _: True))

    def settle(self, arguments: Arguments) -> None:
        """Decides by the arguments of the call whether its result is compared."""
        self.is_judged &= not any(where(arguments) for where in self._unsure)

    # ---- values ----

    def strange(self, values: Tensor) -> Tensor:
        """The values, changed in place to what the call's kind asks for."""
        flat = values.view(-1)
        if self.kind == "scaled":
            most = _SCALES.get(self.dtype, _USUAL_SCALE)
            flat *= 2.0 ** self._random.randint(-most, most)
            self._sprinkle(flat, torch.finfo(self.dtype).smallest_normal / 8, 0.0, -0.0)
        elif self.kind == "special":
            self._sprinkle(flat, math.nan, math.inf, -math.inf)
        elif self.kind == "beyond":
            flat *= 2.0 ** self._random.randint(0, int(math.log2(torch.finfo(self.dtype).max)) - 8)
            largest = torch.finfo(self.dtype).max
            self._sprinkle(flat, largest, -largest, math.inf, math.nan)
        return values

    def _sprinkle(self, flat: Tensor, *specials: float) -> None:
        for _ in range(self._random.randint(0, 3) if flat.numel() else 0):
            flat[self._random.randrange(flat.numel())] = self.pick(*specials)

    def values(self, *shape: int, special: bool = True) -> Tensor:
        """Normal numbers; on a grid -2 to 2 in halves.

        Args:
            shape: sizes.
            special: whether NaN and infinities may be among them. Not where values get weights: one
                of 0 makes NaN of infinity, or leaves it out.
        """
        if self.kind == "grid":
            return self.integers(*shape, low=-4, high=5).double() / 2
        values = self.normal(*shape)
        return values if self.kind == "special" and not special else self.strange(values)

    def boxes(self, count: int, extent: float = 100.0, like: Tensor | None = None) -> Tensor:
        """(count, 4) x1, y1, x2, y2; on a grid also empty ones, and many that are equal.

        Args:
            count: how many.
            extent: side of the square that they are in.
            like: boxes of which some are repeated.
        """
        boxes = Inputs.boxes(self, count, extent)
        if self.kind == "grid":
            step = extent / 8
            corner, size = self.integers(count, 2, high=5), self.integers(count, 2, low=-1, high=5)
            boxes = torch.cat([corner, corner + size], 1) * step
        boxes = self.strange(boxes)
        return boxes if like is None else self.repeated(boxes, like)

    def repeated(self, rows: Tensor, like: Tensor) -> Tensor:
        """The rows, some of them replaced by rows of `like`."""
        if len(like) == 0:
            return rows
        other = like[self.integers(len(rows), high=len(like))]
        return torch.where(self.uniform(len(rows), 1) < 0.3, other, rows)

    def rotated(self, count: int, extent: float = 100.0) -> Tensor:
        """(count, 5) centre, size and angle in radians; on a grid in quarters of a right angle."""
        first, last = self.boxes(count, extent).split(2, 1)
        angle = self.uniform(count, 1, low=-7, high=7)
        if self.kind == "grid":
            angle = self.integers(count, 1, low=-8, high=9) * (math.pi / 8)
        return torch.cat([(first + last) / 2, last - first, angle], 1)

    def upright(self, count: int, extent: float = 100.0) -> Tensor:
        """(count, 7) x, y, z of the centre, dx, dy, dz, and the angle in radians."""
        x, y, dx, dy, angle = self.rotated(count, extent).unbind(1)
        z, dz = self.boxes(count, extent)[:, 1::2].unbind(1)
        return torch.stack([x, y, (z + dz) / 2, dx, dy, dz - z, angle], 1)

    def regions(self, count: int, images: int, extent: float = 100.0) -> Tensor:
        """(count, 5) batch index and box; see `indexed`."""
        return self.indexed(self.boxes(count, extent) - extent / 8, images)

    def indexed(self, rows: Tensor, images: int) -> Tensor:
        """The rows behind a batch index; now and then one out of range.

        The CPU must refuse it. On CUDA, where only the kernel sees it, the region gives 0.
        """
        index = self.integers(len(rows), 1, high=max(images, 1)).double()
        if len(rows) and (images == 0 or self.chance(0.03)):
            if self.device == "cpu":
                self.promise(IndexError)
            index[0] = self.pick(-1, images, images + 1000)
        return torch.cat([index, rows], 1)

    def scores(self, *shape: int) -> Tensor:
        """From 0 to 1; on a grid in quarters."""
        if self.kind == "grid":
            return self.integers(*shape, high=5).double() / 4
        return self.strange(self.uniform(*shape))

    def labels(self, count: int, classes: int) -> Tensor:
        """(count,) int64 classes, some of them out of range."""
        labels = self.integers(count, high=max(classes, 1))
        strange = self.integers(count, low=-1, high=2) * (2**33) + classes
        return torch.where(self.uniform(count) < 0.1, strange, labels)

    def threshold(self, boxes: Tensor | None = None) -> float:
        """For an overlap: any, 0, 1, beyond both, or exactly that of two of the upright boxes."""
        if boxes is not None and self.kind == "grid" and len(boxes) and self.chance(0.5):
            a, b = (boxes[self._random.randrange(len(boxes))] for _ in range(2))
            common = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
            union = sum((box[2:] - box[:2]).clamp(min=0).prod() for box in (a, b)) - common
            return float(common / union) if union > 0 else 0.0
        return self.pick(0.0, 1.0, -0.5, 1.5, 0.5, self.number(0, 1), self.number(0, 1))

    def spoil(self, arguments: dict[str, Any]) -> None:
        """Makes one argument wrong, in a way that a generator would not think of."""
        name = self.pick(*arguments)
        value = arguments[name]
        if isinstance(value, Tensor):
            arguments[name] = self._spoiled(value)
        elif isinstance(value, str):
            arguments[name] = self.pick("nonsense", "")
        elif isinstance(value, float):
            arguments[name] = self.pick(math.nan, -1.0)
        elif isinstance(value, int) and not isinstance(value, bool):
            arguments[name] = self.pick(-1, 0, -(2**40))
        elif isinstance(value, (tuple, list)):
            arguments[name] = self.pick((-1, 0), ())

    def _spoiled(self, tensor: Tensor) -> Tensor:
        choices = [tensor.long(), tensor.bool(), tensor.to(torch.complex64), tensor.float()]
        choices += [tensor.double(), tensor[None], tensor[..., None], tensor.flatten()]
        if tensor.dim():
            choices += [tensor[..., :-1], torch.cat([tensor, tensor[..., :1]], -1), tensor[:0]]
            choices += [tensor.transpose(0, -1), torch.cat([tensor, tensor[:1]])]
        return self.pick(*choices)
