"""`mmcv.ops.nms`: suppression among boxes, inside classes, and of scores instead of boxes."""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor

from torchkiln import ops
from torchkiln.compat.mmcv._common import function_class, listed_errors, promoted, renamed
from torchkiln.compat.mmcv._ops.bbox import bbox_overlaps
from torchkiln.ops.detection.nms_rotated import PEER_QUADRI, suppress_by_peer

__all__ = [
    "NMSop",
    "SoftNMSop",
    "batched_nms",
    "nms",
    "nms_match",
    "nms_quadri",
    "nms_rotated",
    "soft_nms",
]

_F = TypeVar("_F", bound=Callable[..., Any])


def _takes_arrays(function: _F) -> _F:
    """Accepts NumPy arrays for boxes and scores too, and then returns such."""

    @functools.wraps(function)
    def call(boxes: Any, scores: Any, *args: Any, **kwargs: Any) -> Any:
        for name, value in (("boxes", boxes), ("scores", scores)):
            is_known = isinstance(value, (Tensor, numpy.ndarray))
            assert is_known, f"{name} must be a tensor or array; got {type(value).__name__}"
        result = function(torch.as_tensor(boxes), torch.as_tensor(scores), *args, **kwargs)
        if isinstance(boxes, Tensor):
            return result
        return tuple(tensor.cpu().numpy() for tensor in result)

    return call  # type: ignore[return-value]


def _check(boxes: Tensor, scores: Tensor, offset: int) -> None:
    assert boxes.size(1) == 4, f"boxes must be (N, 4); got {tuple(boxes.shape)}"
    assert boxes.size(0) == scores.size(0), "boxes and scores must be equally many"
    assert offset in (0, 1), f"offset must be 0 or 1; got {offset}"


def _wide(tensor: Tensor, offset: int) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if offset else tensor


def _shifted(boxes: Tensor, offset: int) -> Tensor:
    """A box of width x2 - x1 + 1 is one whose x2 lies one pixel further."""
    wide = _wide(boxes, offset)
    return torch.cat([wide[:, :2], wide[:, 2:] + offset], 1) if offset else wide


@listed_errors
def _kept(
    bboxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    offset: int,
    score_threshold: float,
    max_num: int,
    idxs: Tensor | None = None,
) -> Tensor:
    settings: dict[str, Any] = {
        "offset": float(offset),
        "score_threshold": float(score_threshold) if score_threshold > 0 else None,
        "max_output": max_num if max_num > 0 else None,
    }
    pair = promoted(bboxes, scores)
    if idxs is None:
        return ops.nms(*pair, float(iou_threshold), **settings)
    return ops.batched_nms(*pair, idxs, float(iou_threshold), **settings)


def _nms_inds(
    bboxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    offset: int,
    score_threshold: float,
    max_num: int,
) -> Tensor:
    return _kept(bboxes, scores, iou_threshold, offset, score_threshold, max_num)


NMSop = function_class("NMSop", _nms_inds)


@renamed(iou_thr="iou_threshold")
@_takes_arrays
def nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
) -> tuple[Tensor, Tensor]:
    """Keeps the best boxes: each suppresses the lower ones that overlap it by too much.

    Args:
        boxes: (N, 4), a tensor or a NumPy array; x1, y1, x2, y2.
        scores: (N,), alike.
        iou_threshold: a box goes when its IoU with a kept one is greater.
        offset: 0, or 1 for boxes whose last pixel belongs to them.
        score_threshold: above 0, boxes without a greater score are left out.
        max_num: above 0, the most boxes to keep.

    Returns:
        dets: (K, 5), boxes and scores of the kept ones by descending score.
        inds: (K,), int64; their rows. Of equal scores the lower row comes first.

    Raises:
        AssertionError: for another shape or offset.

    Differentiable: dets with respect to boxes and scores.
    """
    _check(boxes, scores, offset)
    inds = _kept(boxes, scores, iou_threshold, offset, score_threshold, max_num)
    return torch.cat([boxes[inds], scores[inds, None]], 1), inds


_SOFT_METHODS = ("naive", "linear", "gaussian")


def _soft_method(method: str) -> int:
    listed = ", ".join(_SOFT_METHODS)
    assert method in _SOFT_METHODS, f"method must be one of {listed}; got {method!r}"
    return _SOFT_METHODS.index(method)


@listed_errors
def _softened(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
    idxs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    name = _SOFT_METHODS[method]
    inds, softened = ops.soft_nms(
        _shifted(boxes.detach(), offset),
        _wide(scores.detach(), offset),
        float(iou_threshold),
        sigma,
        min_score,
        name,
        idxs,
    )
    if boxes.shape[0] > 0 and (torch.compiler.is_compiling() or inds.shape[0] == 0):
        # The best box of all is never tried against min_score. A graph cannot ask how many stay.
        best = scores.detach().argmax(keepdim=True)
        most = torch.sym_max(inds.shape[0], 1)
        inds = torch.cat([inds, best])[:most]
        softened = torch.cat([softened, scores.detach()[best].to(softened)])[:most]
    return torch.cat([boxes.detach()[inds], softened.to(boxes)[:, None]], 1), inds


def _soft_rows(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> tuple[Tensor, Tensor]:
    """As the peer's: (N, 5) on the CPU, whose first K rows count, and (K,) rows of the boxes."""
    dets, inds = _softened(boxes, scores, iou_threshold, sigma, min_score, int(method), int(offset))
    rest = boxes.shape[0] - inds.shape[0]
    return torch.cat([dets, dets.new_zeros(rest, 5)]).cpu(), inds.cpu()


SoftNMSop = function_class("SoftNMSop", _soft_rows)


@renamed(iou_thr="iou_threshold")
@_takes_arrays
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Lowers the scores of boxes that overlap better ones, and leaves out what falls too low.

    Args:
        boxes: (N, 4), a tensor or a NumPy array; x1, y1, x2, y2.
        scores: (N,), alike.
        iou_threshold: from which IoU on the methods naive and linear act.
        sigma: width of the gaussian method.
        min_score: a box whose score falls below it goes.
        method: "naive" (score 0), "linear" (times 1 - IoU) or "gaussian".
        offset: 0, or 1 for boxes whose last pixel belongs to them.

    Returns:
        dets: (K, 5), boxes and their new scores, descending.
        inds: (K,), int64; their rows. Of equal scores the lower row comes first.

    Raises:
        AssertionError: for another shape, method or offset.

    Differentiable: no.

    Source:
        Bodla et al., "Soft-NMS", 2017, equations 2 and 3.
    """
    _check(boxes, scores, offset)
    number = _soft_method(method)
    return _softened(boxes, scores, iou_threshold, sigma, min_score, number, offset)


def nms_match(dets: Any, iou_threshold: float) -> list[Any]:
    """Groups boxes: each kept one, and then those that it suppresses.

    Args:
        dets: (N, 5), a tensor or a NumPy array; x1, y1, x2, y2, score.
        iou_threshold: a box joins the group of a better one from this IoU on, both rounded to
            float32.

    Returns:
        Groups by descending score of their first row, each an int64 tensor on the device of `dets`,
        or an array of integers.

    Raises:
        AssertionError: for another shape.

    Differentiable: no.
    """
    if dets.shape[0] == 0:
        return []
    assert dets.shape[-1] == 5, f"dets must be (N, 5); got {tuple(dets.shape)}"
    boxes = torch.as_tensor(dets).detach()
    order = boxes[:, 4].argsort(descending=True, stable=True)
    rows = order.cpu().numpy()
    is_free, groups = numpy.ones(len(rows), dtype=bool), []
    for best, joins in enumerate(_joins(boxes[order, :4], float(iou_threshold))):
        if is_free[best]:
            is_free[best] = False  # a box that is NaN does not join itself
            members = (joins & is_free).nonzero()[0]
            is_free[members] = False
            groups.append(rows[[best, *members]])
    if isinstance(dets, Tensor):
        return [torch.from_numpy(group).to(dets.device) for group in groups]
    return groups


def _joins(boxes: Tensor, iou_threshold: float) -> Iterator[numpy.ndarray]:
    """For each box (N,): which ones reach the threshold with it, in mmcv's rounding."""
    threshold = torch.tensor(iou_threshold, dtype=torch.float32).item()
    for some in boxes.split(1024):
        yield from (bbox_overlaps(some, boxes) >= threshold).cpu().numpy()


@listed_errors
def nms_rotated(
    dets: Tensor,
    scores: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Keeps the best rotated boxes: each suppresses the lower ones that overlap it by too much.

    Args:
        dets: (N, 5), x, y, w, h and the angle in radians.
        scores: (N,).
        iou_threshold: a box goes when its IoU with a kept one is greater.
        labels: not looked at, as in mmcv.
        clockwise: whether a positive angle turns from x towards y.

    Returns:
        dets: (K, 6), boxes and scores of the kept ones by descending score.
        keep: (K,), int64; their rows. None where there are no boxes.

    Differentiable: dets with respect to dets and scores.
    """
    if dets.shape[0] == 0:
        return dets, None
    keep = ops.nms_rotated(*promoted(dets, scores), float(iou_threshold), None, clockwise)
    return torch.cat([dets[keep], scores[keep, None]], 1), keep


@listed_errors
def nms_quadri(
    dets: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Keeps the best quadrilaterals: each suppresses the lower ones that overlap it by too much.

    Args:
        dets: (N, 8), x1, y1, ..., x4, y4. Corners are looked for as if these were rectangles.
        scores: (N,).
        iou_threshold: a box goes when its IoU with a kept one is greater.
        labels: not looked at, as in mmcv.

    Returns:
        dets: (K, 9), boxes and scores of the kept ones by descending score.
        keep: (K,), int64; their rows. None where there are no boxes.

    Differentiable: dets with respect to dets and scores.
    """
    if dets.shape[0] == 0:
        return dets, None
    keep = suppress_by_peer(dets, scores, iou_threshold, PEER_QUADRI)
    return torch.cat([dets[keep], scores[keep, None]], 1), keep


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    nms_cfg: dict[str, Any] | None,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Suppression inside classes, by the function that a configuration names.

    Args:
        boxes: (N, 4) boxes, or (N, 5) rotated ones.
        scores: (N,).
        idxs: (N,); the class of each box.
        nms_cfg: `type`, a name in `mmcv.ops.nms` or a function, by default "nms"; `split_thr`, the
            number of boxes from which on each class is treated alone, by default 10000;
            `class_agnostic`, over the argument; the function's own arguments. None: keeps all.
        class_agnostic: whether boxes of different classes suppress each other.

    Returns:
        dets: (K, 5) or (K, 6), boxes and scores, descending.
        keep: (K,), int64; their rows.
    """
    if nms_cfg is None:
        scores, keep = scores.sort(descending=True)
        return torch.cat([boxes[keep], scores[:, None]], 1), keep
    if boxes.size(0) == 0:
        return torch.cat([boxes, scores[:, None]], 1), idxs.new_empty(0, dtype=torch.int64)
    settings = dict(nms_cfg)
    class_agnostic = settings.pop("class_agnostic", class_agnostic)
    kind = settings.pop("type", "nms")
    is_whole = boxes.size(0) < settings.pop("split_thr", 10000)
    by_class = _BY_CLASS.get(kind) if isinstance(kind, str) else None
    if not class_agnostic and by_class and not (is_whole and kind in _MOVED):
        max_num = settings.pop("max_num", -1)
        dets, keep = by_class(boxes, scores, _integers(idxs), **settings)
        if max_num > 0:
            dets, keep = dets[:max_num], keep[:max_num]
        return torch.cat([boxes[keep], dets[:, -1:]], 1), keep
    function = _function(kind)
    if class_agnostic or is_whole:
        apart = boxes if class_agnostic else _moved_apart(boxes, idxs)
        dets, keep = function(apart, scores, **settings)
        return torch.cat([boxes[keep], dets[:, -1:]], 1), keep
    max_num = settings.pop("max_num", -1)
    rescored = scores.new_zeros(scores.size())
    kept = torch.zeros(scores.size(), dtype=torch.bool, device=scores.device)
    for label in idxs.unique():
        rows = (idxs == label).nonzero().squeeze(1)
        dets, inds = function(boxes[rows], scores[rows], **settings)
        kept[rows[inds]] = True
        rescored[rows[inds]] = dets[:, -1]
    keep = kept.nonzero().squeeze(1)
    scores, order = rescored[keep].sort(descending=True, stable=True)
    keep = keep[order]
    if max_num > 0:
        keep, scores = keep[:max_num], scores[:max_num]
    return torch.cat([boxes[keep], scores[:, None]], 1), keep


@renamed(iou_thr="iou_threshold")
def _nms_by_class(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    offset: int = 0,
    score_threshold: float = 0,
) -> tuple[Tensor, Tensor]:
    _check(boxes, scores, offset)
    inds = _kept(boxes, scores, iou_threshold, offset, score_threshold, -1, idxs)
    return scores[inds, None], inds


@renamed(iou_thr="iou_threshold")
def _soft_nms_by_class(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    _check(boxes, scores, offset)
    number = _soft_method(method)
    return _softened(boxes, scores, iou_threshold, sigma, min_score, number, offset, idxs)


@listed_errors
def _rotated_by_class(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
    clockwise: bool = True,
) -> tuple[Tensor, Tensor]:
    inds = ops.nms_rotated(*promoted(boxes, scores), float(iou_threshold), idxs, clockwise)
    return scores[inds, None], inds


@listed_errors
def _quadri_by_class(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    iou_threshold: float,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    inds = suppress_by_peer(boxes, scores, iou_threshold, PEER_QUADRI, idxs)
    return scores[inds, None], inds


# Types with classes of their own: one call instead of one for each class.
_BY_CLASS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "nms": _nms_by_class,
    "soft_nms": _soft_nms_by_class,
    "nms_rotated": _rotated_by_class,
    "nms_quadri": _quadri_by_class,
}
# Those that keep mmcv's shift, and what follows of it, below `split_thr`.
_MOVED = {"nms", "nms_rotated", "nms_quadri"}


def _integers(idxs: Tensor) -> Tensor:
    """Integer classes for those of any dtype."""
    if idxs.is_floating_point() or idxs.dtype == torch.bool:
        _, idxs = idxs.unique(return_inverse=True)
    return idxs


def _function(kind: str | Callable[..., Any]) -> Callable[..., Any]:
    if callable(kind):
        return kind
    from torchkiln.compat.mmcv import _tree

    return getattr(_tree.modules()["mmcv.ops.nms"], kind)  # type: ignore[no-any-return]


def _moved_apart(boxes: Tensor, idxs: Tensor) -> Tensor:
    """Moves each class so far that boxes of two never meet; mmcv's shift, with its rounding."""
    if boxes.numel() == 0:
        return boxes
    if boxes.size(-1) == 5:  # centre, size, angle
        furthest = boxes[:, :2].max() + boxes[:, 2:4].max()
        shifts = idxs.to(boxes)[:, None] * (furthest + 1)
        return torch.cat([boxes[:, :2] + shifts, boxes[:, 2:]], 1)
    return boxes + idxs.to(boxes)[:, None] * (boxes.max() + 1)
