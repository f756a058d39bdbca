"""The exceptions, and how an operator's RuntimeError becomes one of them."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pickle

import pytest
import torch

from torchkiln import errors, ops

KINDS = [
    (1, TypeError),
    (2, ValueError),
    (3, IndexError),
    (4, errors.KernelCompileError),
    (5, errors.CompilerNotFoundError),
    (6, errors.DriverError),
    (7, errors.CaptureError),
]
DETAILS = {
    "log": "error: expected ';'",
    "excerpt": "41 | int x",
    "options": ["-std=c++17"],
    "source_path": "kept/source.cu",
    "specialization": "detection/box_iou.forward<float, mode=0>@sm_90",
}


def record(kind: int, message: str) -> dict[str, object]:
    return {"kind": kind, "argument": "boxes", "message": message, "details": DETAILS}


@pytest.mark.parametrize(("kind", "expected"), KINDS)
def test_translate_by_kind(kind: int, expected: type[Exception]) -> None:
    # torch adds text on both sides.
    raised = RuntimeError("call, file.cpp:41, op: boxes must fit; got 3\nException raised from")
    found = errors.translate(raised, lambda: record(kind, "op: boxes must fit; got 3"))
    assert type(found) is expected
    assert str(found) == "op: boxes must fit; got 3"


@pytest.mark.parametrize("kind", [0, 8, 99])
def test_translate_keeps_internal_and_unknown_kinds(kind: int) -> None:
    raised = RuntimeError("internal error: negative grid")
    assert errors.translate(raised, lambda: record(kind, "internal error: negative grid")) is raised


@pytest.mark.parametrize("message", ["op: an older failure", ""])
def test_translate_ignores_a_stale_record(message: str) -> None:
    raised = RuntimeError("out of memory")
    assert errors.translate(raised, lambda: record(2, message)) is raised


WRONG_TYPES = {
    "roi_align: sampling_ratio must be an integer; got str": {"sampling_ratio": "x"},
    "roi_align: sampling_ratio must be an integer; got 1.5": {"sampling_ratio": 1.5},
    f"roi_align: sampling_ratio must be an integer of 64 bits; got {2**63}": {
        "sampling_ratio": 2**63
    },
    "roi_align: spatial_scale must be a number; got None": {"spatial_scale": None},
    "roi_align: aligned must be a bool; got list": {"aligned": [1]},
}


@pytest.mark.parametrize("sentence", WRONG_TYPES)
def test_a_wrong_python_type(sentence: str) -> None:
    with pytest.raises(TypeError) as caught:
        ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(0, 5), 2, **WRONG_TYPES[sentence])
    assert str(caught.value) == sentence


def test_a_wrong_python_type_in_lists() -> None:
    maps, boxes = [torch.zeros(1, 1, 4, 4)], torch.zeros(0, 5)
    with pytest.raises(TypeError, match=r"^multi_scale_roi_align: inputs must be a list of"):
        ops.multi_scale_roi_align([*maps, 1], boxes, 2, [1.0, 0.5], [8.0])
    rule = "^multi_scale_roi_align: spatial_scales must be a list"
    for scales in (["x"], 1.0):
        with pytest.raises(TypeError, match=rule):
            ops.multi_scale_roi_align(maps, boxes, 2, scales, [])
    with pytest.raises(TypeError, match=r"^nms: score_threshold must be a number; got str$"):
        ops.nms(boxes[:, 1:], boxes[:, 0], 0.5, score_threshold="x")


def test_sparse_tensors() -> None:
    boxes, maps = torch.ones(2, 4), torch.ones(1, 1, 4, 4)
    with pytest.raises(TypeError, match=r"^box_iou: boxes2 must be dense; got torch.sparse_coo\. "):
        ops.box_iou(boxes, boxes.to_sparse())
    with pytest.raises(TypeError, match=r"^multi_scale_roi_align: inputs must be dense; got "):
        ops.multi_scale_roi_align([maps.to_sparse()], torch.zeros(0, 5), 2, [1.0], [])
    with pytest.raises(TypeError, match=r"^box_area: boxes must be dense; got torch.sparse_coo\. "):
        ops.box_area(boxes.to_sparse())


@pytest.mark.parametrize("kind", [expected for _, expected in KINDS[3:]])
def test_errors_survive_pickling(kind: type[errors.TorchkilnError]) -> None:
    error = kind("a sentence", DETAILS)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert isinstance(copy, RuntimeError)
    assert (str(copy), copy.details) == ("a sentence", DETAILS)
    assert copy.specialization == DETAILS["specialization"]


def test_compile_error_carries_its_data() -> None:
    error = errors.KernelCompileError("a sentence", DETAILS)
    assert (error.log, error.excerpt) == (DETAILS["log"], DETAILS["excerpt"])
    assert (error.options, error.source_path) == (DETAILS["options"], DETAILS["source_path"])
    bare = errors.KernelCompileError("a sentence")
    assert (bare.log, bare.options, bare.specialization) == ("", [], "")


def test_raised_without_the_error_behind_it() -> None:
    with pytest.raises(ValueError, match="boxes1 must have shape") as caught:
        ops.box_iou(torch.zeros(2, 3), torch.zeros(2, 4))
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None


def test_raw_operator_raises_the_same_text() -> None:
    with pytest.raises(RuntimeError, match="box_iou: boxes1 must have shape"):
        torch.ops.torchkiln.box_iou(torch.zeros(2, 3), torch.zeros(2, 4))


def test_an_old_failure_does_not_colour_a_new_one() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        ops.box_iou(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeError, match="must be a floating-point tensor"):
        ops.box_iou(torch.zeros(2, 4).int(), torch.zeros(2, 4))


MIXED = {
    "box_iou: boxes2 .* boxes1": (ops.box_iou, ((3, 4), (2, 4))),
    "nms: scores .* boxes": (lambda *args: ops.nms(*args, 0.5), ((3, 4), (3,))),
    "selective_scan: A .* u": (
        lambda u, A: ops.selective_scan(u, u, A, torch.zeros(4, 2), torch.zeros(4, 2)),
        ((1, 4, 3), (4, 2)),
    ),
}


@pytest.mark.parametrize("sentence", MIXED)
def test_a_meta_tensor_beside_others(sentence: str) -> None:
    """Torch calls the fake then, which writes nothing."""
    function, shapes = MIXED[sentence]
    rule = sentence.replace(" .* ", " must be on the device of ")
    first, second = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=rf"^{rule} \(cpu\); got meta$"):
        function(first, second.to("meta"))


def test_what_is_no_tensor() -> None:
    with pytest.raises(TypeError, match=r"^box_iou: boxes1 must be a tensor; got list$"):
        ops.box_iou([1.0], torch.zeros(2, 4))
    with pytest.raises(TypeError, match=r"^causal_conv1d: bias must be a tensor; got float$"):
        ops.causal_conv1d_fn(torch.zeros(1, 2, 3), torch.zeros(2, 4), 1.0)
