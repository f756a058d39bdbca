"""SimpleRoIAlign: one bilinear sample for each bin of a region."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchkiln.ops import generate_grid, rel_roi_point_to_rel_img_point
from torchkiln.ops._arguments import require_device, require_floating, shape, widened
from torchkiln.ops.detection._regions import bins_of

__all__ = ["SimpleRoIAlign"]


class SimpleRoIAlign(nn.Module):
    """Samples each region of interest once in the middle of each bin, as PointRend does.

    Args:
        output_size: bins, (height, width) or one number for both.
        spatial_scale: cells per pixel.
        aligned: whether position 0 is the edge of the first cell, else its centre.
    """

    def __init__(
        self, output_size: int | tuple[int, int], spatial_scale: float, aligned: bool = True
    ) -> None:
        super().__init__()
        self.output_size = bins_of("SimpleRoIAlign", output_size)
        if min(self.output_size) < 1:
            raise ValueError(
                f"SimpleRoIAlign: output_size must be at least 1; got {self.output_size}"
            )
        self.spatial_scale = spatial_scale
        self.aligned = aligned

    def forward(self, features: Tensor, rois: Tensor) -> Tensor:
        """Samples the regions, all at once and in their order.

        Args:
            features: (N, C, H, W), floating.
            rois: (K, 5) batch index, x1, y1, x2, y2 in pixels; floating.

        Returns:
            (K, C, height, width), dtype of `features`; 0 outside the image, for an index of no
            image, and for coordinates that are not finite.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or two different devices.
        """
        _check(features, rois)
        height, width = self.output_size
        regions = rois.to(widened(features).dtype)
        grid = generate_grid(rois.shape[0], self.output_size, rois.device).to(regions)
        x, y = rel_roi_point_to_rel_img_point(regions, grid, features, self.spatial_scale).unbind(2)
        rows, columns = features.shape[2:]
        if self.aligned:
            x, y = x * columns - 0.5, y * rows - 0.5
        else:
            x, y = x * (columns - 1), y * (rows - 1)
        sampled = _sample(features, regions[:, 0], x, y)
        pooled: Tensor = sampled.movedim(2, 1).unflatten(2, (height, width))
        return pooled

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"aligned={self.aligned}"
        )


def _check(features: Tensor, rois: Tensor) -> None:
    require_floating("SimpleRoIAlign", features=features, rois=rois)
    if features.dim() != 4:
        raise ValueError(
            f"SimpleRoIAlign: features must have shape (N, C, H, W); got {shape(features)}"
        )
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"SimpleRoIAlign: rois must have shape (K, 5); got {shape(rois)}")
    require_device("SimpleRoIAlign", features=features, rois=rois)


def _sample(features: Tensor, index: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(K, P, C): bilinear samples of image `index` (K,) at x, y (K, P), zeros outside."""
    images, channels, rows, columns = features.shape
    if features.numel() == 0:
        return features.sum().expand(*x.shape, channels)
    cells = features.permute(0, 2, 3, 1)
    is_valid = ((index > -1) & (index < images))[:, None] & x.isfinite() & y.isfinite()
    image = torch.where(is_valid, index[:, None], 0).long()
    x, y = torch.where(is_valid, x, -9.0), torch.where(is_valid, y, -9.0)
    left, top = x.detach().floor(), y.detach().floor()
    total = torch.zeros((*x.shape, channels), dtype=x.dtype, device=x.device)
    for row, share_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, share_x in ((left, left + 1 - x), (left + 1, x - left)):
            is_inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
            y_cell, x_cell = row.clamp(0, rows - 1).long(), column.clamp(0, columns - 1).long()
            taken = widened(cells[image, y_cell, x_cell])
            share = (share_x * share_y)[..., None]
            total = total + torch.where(is_inside[..., None], taken * share, 0.0)
    return total.to(features.dtype)
