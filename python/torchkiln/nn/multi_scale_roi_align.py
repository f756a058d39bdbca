"""RoIAlign over a feature pyramid as modules: torchvision's, and mmdet's extractor."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from torchkiln.ops.detection._regions import bins_of
from torchkiln.ops.detection.multi_scale_roi_align import multi_scale_roi_align

__all__ = ["MultiScaleRoIAlign", "SingleRoIExtractor"]


class MultiScaleRoIAlign(nn.Module):
    """Pools regions on the level of a pyramid that suits their size, as torchvision's module does.

    A region of side s, the square root of its area, belongs to the level
    floor(canonical_level + log2(s / canonical_scale) + 1e-6), within those that there are; level i
    has 2^-i pixels per image pixel.

    Args:
        featmap_names: the feature maps to use, finest first.
        output_size: bins, (height, width) or one number for both.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.
        canonical_scale: the side of a box that belongs to `canonical_level`.
        canonical_level: see `canonical_scale`.
    """

    #: Moves the borders between levels down, lest rounding keeps a box on the border below it.
    EPS = 1e-6

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = list(featmap_names)
        self.output_size = bins_of("MultiScaleRoIAlign", output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        #: Pixels of each level per image pixel; found at the first call and kept.
        self.scales: list[float] | None = None

    def forward(
        self,
        x: Mapping[str, Tensor],
        boxes: Sequence[Tensor],
        image_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Pools the regions of all images.

        Args:
            x: feature maps (N, C, H, W) by name; others than `featmap_names` are left out.
            boxes: (L, 4) x1, y1, x2, y2 in image pixels, of each image.
            image_shapes: (height, width) of each image before it was padded to the common size.

        Returns:
            (K, C, height, width), in the order of the boxes.

        Raises:
            ValueError: where no map has a name of `featmap_names`, a map or the images have no
                pixels, or a map's sides are not the same share of the images' by a power of two.
        """
        maps = [map for name, map in x.items() if name in self.featmap_names]
        if not maps:
            raise ValueError(
                f"MultiScaleRoIAlign: x must have maps named {', '.join(self.featmap_names)}; "
                f"got {', '.join(x)}"
            )
        if self.scales is None:
            self.scales = [_scale_of(map, image_shapes) for map in maps]
        return multi_scale_roi_align(
            maps, boxes, self.output_size, self.scales, self._sides(), self.sampling_ratio
        )

    def _sides(self) -> list[float]:
        assert self.scales is not None
        first = -math.log2(self.scales[0])
        return [
            self.canonical_scale * 2 ** (first + i - self.canonical_level - self.EPS)
            for i in range(1, len(self.scales))
        ]

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"featmap_names={self.featmap_names}, output_size={self.output_size}, "
            f"sampling_ratio={self.sampling_ratio}"
        )


def _scale_of(map: Tensor, image_shapes: Sequence[tuple[int, int]]) -> float:
    """The power of two that the map's sides are of those of the largest image."""
    if not image_shapes:
        raise ValueError(
            "MultiScaleRoIAlign: image_shapes must have a shape for each image; got []"
        )
    sides = [max(shape[axis] for shape in image_shapes) for axis in (0, 1)]
    if min(*map.shape[-2:], *sides) < 1:
        raise ValueError(
            "MultiScaleRoIAlign: x and image_shapes must have sides of at least 1; got "
            f"{tuple(map.shape[-2:])} for images of {tuple(sides)}"
        )
    found = [_nearest_power(size, side) for size, side in zip(map.shape[-2:], sides, strict=True)]
    if found[0] != found[1]:
        raise ValueError(
            "MultiScaleRoIAlign: x must have maps of the images' proportions; got "
            f"{tuple(map.shape[-2:])} for images of {tuple(sides)}"
        )
    return found[0]


def _nearest_power(size: int, side: int) -> float:
    """2 to the rounded logarithm of size / side, in integers.

    torch.compile can check those of symbolic sizes, and fails on the logarithms.
    """
    exponent = 0
    while size * size >= 2 * side * side:
        side, exponent = 2 * side, exponent + 1
    while 2 * size * size < side * side:
        size, exponent = 2 * size, exponent - 1
    return 2.0**exponent


class SingleRoIExtractor(nn.Module):
    """Pools regions on the level of a pyramid that suits their size, as mmdet's extractor does.

    A region of side s, the square root of its area, belongs to the level
    floor(log2(s / finest_scale + 1e-6)), within those that there are.

    Args:
        output_size: bins, (height, width) or one number for both.
        featmap_strides: image pixels per pixel of each level, finest first.
        finest_scale: the side below which all boxes belong to the first level is twice this.
        sampling_ratio: samples per bin and axis; 0 or less: one per input pixel, rounded up.
        aligned: moves positions by half a pixel.
    """

    #: As in `MultiScaleRoIAlign`.
    EPS = 1e-6

    def __init__(
        self,
        output_size: int | tuple[int, int],
        featmap_strides: Sequence[float],
        finest_scale: float = 56,
        sampling_ratio: int = 0,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.featmap_strides = list(featmap_strides)
        self.finest_scale = finest_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, feats: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Pools the regions.

        Args:
            feats: (N, C, H, W) of each level; those beyond the strides are left out.
            rois: (K, 5) batch index, x1, y1, x2, y2 in image pixels.

        Returns:
            (K, C, height, width).
        """
        scales = [1 / stride for stride in self.featmap_strides]
        sides = [self.finest_scale * (2.0**i - self.EPS) for i in range(1, len(scales))]
        return multi_scale_roi_align(
            feats[: len(scales)],
            rois,
            self.output_size,
            scales,
            sides,
            self.sampling_ratio,
            self.aligned,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"output_size={self.output_size}, featmap_strides={self.featmap_strides}, "
            f"finest_scale={self.finest_scale}, sampling_ratio={self.sampling_ratio}, "
            f"aligned={self.aligned}"
        )
