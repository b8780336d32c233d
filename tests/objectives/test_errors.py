"""What the losses on rows of logits refuse, by name."""

import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from kdfast import Head, SoftLabels
from kdfast.objectives import (
    Hint,
    Projector,
    attention_transfer,
    class_weighted_ce,
    dist_loss,
    entropy_matching,
    margin_ce,
    pairwise_hinge,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
    teacher_argmax,
    teacher_argmax_ce,
)

S, T, Y, W = torch.randn(4, 7), torch.randn(4, 7), torch.tensor([0, 1, 2, 6]), torch.ones(7)
HEAD = Head(torch.randn(4, 3), torch.randn(7, 3))
PROBS = T.softmax(-1)
TOPK = SoftLabels.topk(torch.tensor([[0, 3]] * 4), torch.full((4, 2), -1.0), torch.full((4,), -1.0), vocab_size=7)

CASES = {
    "margin of probabilities": (
        lambda: margin_ce(S, PROBS),
        TypeError,
        "class indices for a margin, got torch.float32",
    ),
    "margin without labels": (lambda: margin_ce(S, None), ValueError, "labels are required by a margin"),
    "negative margin": (lambda: pairwise_hinge(S, Y, -1.0), ValueError, "margin must be .*not negative, got -1.0"),
    "margin type": (lambda: margin_ce(S, Y, "1"), TypeError, "margin must be a number, got str"),
    "labels' shape": (lambda: pairwise_hinge(S, Y[:2]), ValueError, r"labels must be \(4,\).*got \(2,\)"),
    "logits' type": (lambda: margin_ce(S.long(), Y), TypeError, "logits must be float32.*got torch.int64"),
    "reduction": (lambda: pairwise_hinge(S, Y, reduction="batchmean"), ValueError, "got 'batchmean'"),
    "row_weight": (lambda: entropy_matching(S, T, row_weight=torch.ones(3)), ValueError, r"row_weight .*got \(3,\)"),
    "labels as probabilities": (
        lambda: entropy_matching(S, T, PROBS),
        TypeError,
        "class indices here, got torch.float",
    ),
    "temperature": (lambda: entropy_matching(S, T, temperature=0.0), ValueError, "temperature must be positive"),
    "temperature of DIST": (lambda: dist_loss(S, T, temperature=-1.0), ValueError, "temperature must be positive"),
    "classes": (lambda: entropy_matching(S, T[:, :5]), ValueError, "student has 7 classes, teacher 5: they must agree"),
    "classes of DIST": (lambda: dist_loss(S, T[:, :5]), ValueError, "student has 7 classes, teacher 5"),
    "rows of DIST": (lambda: dist_loss(S, T[:3]), ValueError, "same leading dimensions"),
    "rows of labels": (lambda: dist_loss(S, SoftLabels.dense(T[:3])), ValueError, "teacher has 3 rows"),
    "top-k for entropies": (lambda: entropy_matching(S, TOPK), ValueError, "topk soft labels do not hold .*dense and"),
    "top-k for DIST": (lambda: dist_loss(S, TOPK), ValueError, "topk soft labels do not hold .*dense and hidden"),
    "teacher's gradient": (lambda: dist_loss(S, T.clone().requires_grad_()), ValueError, "teacher requires grad"),
    "teacher is a list": (lambda: dist_loss(S, [1.0]), TypeError, "teacher must be a tensor of logits, got list"),
    "teacher is a Head": (lambda: entropy_matching(S, HEAD), TypeError, "teacher must be a tensor.*got Head"),
    "argmax of a list": (lambda: teacher_argmax([1.0]), TypeError, "tensor of logits or soft labels, got list"),
    "argmax of integers": (lambda: teacher_argmax(Y), TypeError, r"\(..., C\) logits, got torch.int64"),
    "argmax, other rows": (lambda: teacher_argmax_ce(S, T[:3]), ValueError, "teacher has 3 rows"),
    "class weights as a list": (lambda: class_weighted_ce(S, T, [1.0]), TypeError, "class_weight must be .*got list"),
    "class weights' shape": (
        lambda: class_weighted_ce(S, T, W[:3]),
        ValueError,
        r"class_weight must be \(7,\) or \(4, 7\), got \(3,\)",
    ),
    "class weights train": (
        lambda: class_weighted_ce(S, T, W.clone().requires_grad_()),
        ValueError,
        "class_weight requires grad",
    ),
    "class weights' device": (lambda: class_weighted_ce(S, T, W.to("meta")), ValueError, "class_weight on meta"),
    "class weights, temperatures": (
        lambda: class_weighted_ce(S, T, W, temperature=torch.ones(4)),
        TypeError,
        "temperature must be a number for class weights, got Tensor",
    ),
    "class weights, divergence": (
        lambda: class_weighted_ce(S, T, W, divergence="reverse_kl"),
        TypeError,
        "multiple values for keyword argument 'divergence'",
    ),
    "class weights, classes": (lambda: class_weighted_ce(S, T[:, :5], W), ValueError, "student has 7 classes, teacher"),
}


@pytest.mark.parametrize("case", CASES)
def test_named_error(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_a_teacher_may_require_grad_where_nothing_is_trained():
    trained, features = T.clone().requires_grad_(), FEATURES.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(dist_loss(S, trained), dist_loss(S, T))
        assert torch.equal(rkd_distance(FEATURES[0], features[1]), rkd_distance(*FEATURES))
        assert torch.equal(class_weighted_ce(S, T, nn.Parameter(W)), class_weighted_ce(S, T, W))
    with pytest.raises(ValueError, match="teacher requires grad"):
        rkd_distance(FEATURES[0], features[1])


@pytest.mark.parametrize(
    "call", [dist_loss, entropy_matching, lambda s, t: class_weighted_ce(s, t, W)], ids=["dist", "entropy", "weighted"]
)
def test_probabilities_are_found_at_the_first_call(call):
    with pytest.raises(ValueError, match="teacher holds probabilities"):
        call(S, PROBS)


def test_values_are_looked_at_on_request(monkeypatch):
    monkeypatch.setenv("KDFAST_CHECK", "1")
    call = partial(dist_loss, S)
    for teacher, expected in ((T, nullcontext()), (PROBS, pytest.raises(ValueError, match="holds probabilities"))):
        with expected:  # not only in the first call of a line
            call(teacher)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\).*to 9"):
        pairwise_hinge(S, Y + 3)
    with pytest.raises(ValueError, match=r"class_weight must be finite and not negative, got -1.0"):
        class_weighted_ce(S, T, -W)


FEATURES, MASK = torch.randn(2, 4, 5, 6), torch.ones(4, 5) > 0
CALLS = {
    margin_ce: {"logits": S, "labels": Y, "margin": 1.0, "row_weight": Y > 0},
    pairwise_hinge: {"logits": S, "labels": Y, "margin": 1.0, "row_weight": Y > 0},
    dist_loss: {"student": S, "teacher": T, "labels": Y, "temperature": 2.0, "beta": 1.0, "gamma": 2.0},
    entropy_matching: {"student": S, "teacher": T, "labels": Y, "temperature": 2.0, "squared": True, "num_items": 3},
    class_weighted_ce: {"student": S, "teacher": T, "class_weight": W, "labels": Y, "temperature": 2.0},
    teacher_argmax: {"teacher": T, "ignore_index": -100},
    teacher_argmax_ce: {"student": S, "teacher": T, "labels": Y},
    attention_transfer: {"student": FEATURES[0], "teacher": FEATURES[1], "mask": MASK},
    rkd_distance: {"student": FEATURES[0], "teacher": FEATURES[1]},
    rkd_angle: {"student": FEATURES[0], "teacher": FEATURES[1]},
    similarity_preserving: {"student": FEATURES[0], "teacher": FEATURES[1]},
    pkt: {"student": FEATURES[0], "teacher": FEATURES[1]},
    Projector: {"student_width": 6, "teacher_width": 5, "dim": -1},
    Hint: {"student_width": 6, "teacher_width": 6, "kind": "mse", "dim": -1},
    Hint(6, 6): {"student": FEATURES[0], "teacher": FEATURES[1], "mask": MASK},
}
WRONG = [
    None, "2", b"2", [1.0], (1,), {}, object(), np.ones(3), math.nan, math.inf, -3, 2.5, True, 1j, 10**400,
    torch.ones(3), 1j * torch.ones(4, 7), Y > 0, torch.tensor(5),
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: getattr(call, "__name__", "Hint()"))
def test_every_argument_of_a_wrong_type_is_named(call):
    arguments = CALLS[call]
    call(**arguments)
    for name in arguments:
        errors = [_error(call, {**arguments, name: value}) for value in WRONG]
        assert any(errors), name
        # Logits of another shape are right, and the labels or weights that were for others are not.
        others = {"logits": ["labels"], "student": ["teacher", "class_weight"]}.get(name, [])
        for value, error in zip(WRONG, errors, strict=True):
            assert error is None or any(x in error for x in (name, *others)), (name, value, error)


def _error(call, arguments):
    """What a call says against its arguments; None if it takes them. Other errors are none of its kind."""
    try:
        call(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y, **options: margin_ce(x, y, **options),
        lambda x, y, **options: teacher_argmax_ce(x, x.detach(), **options),
        lambda x, y, **options: class_weighted_ce(x, x.detach(), torch.ones(5), **options),
    ],
    ids=["margin_ce", "teacher_argmax_ce", "class_weighted_ce"],
)
def test_losses_that_need_whole_rows_refuse_a_shared_vocabulary(loss):
    with pytest.raises(ValueError, match="needs all classes of a row: group="):
        loss(torch.randn(3, 5), torch.tensor([0, 1, 2]), group=object())
