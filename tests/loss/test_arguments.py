"""What kd_loss takes: numbers of many kinds, labels, vocabularies that differ, and parts under weights."""

import math
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdfast import Divergence, Head, KDLoss, SoftLabels, jsd, kd_loss
from kdfast.distill import KD
from kdfast.loss.checks import check_vocabularies
from kdfast.models import look_like_probabilities
from kdfast.objectives import margin_ce
from kdfast.testing import loss_and_gradient

S, T, Y = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.tensor([[0, 1, 2], [6, 5, 4]])


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_weight", [[1.0, 0.0, 0.3, 0.0], [1.0, 1.0, 2.0, 0.5]])
def test_parts_are_the_mean_over_rows_that_weigh_something(row_weight):
    student, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    weight = torch.tensor(row_weight, dtype=torch.float64)
    loss, parts = kd_loss(student, teacher, row_weight=weight, return_parts=True)
    p, q = teacher.softmax(-1), student.softmax(-1)
    rows = (p * (p / q).log()).sum(-1)
    assert torch.allclose(loss, (weight * rows).mean())
    assert torch.allclose(parts.kd, rows[weight != 0].mean())
    assert torch.allclose(parts.entropy, -(q * q.log()).sum(-1)[weight != 0].mean())
    _, per_row = kd_loss(student, teacher, row_weight=weight, return_parts=True, reduction="none")
    assert torch.allclose(per_row.kd, torch.where(weight != 0, rows, 0.0))
    assert torch.allclose((weight * per_row.kd).sum() / weight.sum(), (weight * rows).sum() / weight.sum())


def test_parts_of_a_head_and_of_weights_per_row():
    student, teacher = torch.randn(2, 4, 9)
    weight = torch.tensor([1.0, 0.0, 0.3, 0.0])
    _, parts = kd_loss(student, teacher, row_weight=weight, return_parts=True)
    _, of_head = kd_loss(Head(student, torch.eye(9)), teacher, row_weight=weight, return_parts=True)
    _, of_weights = kd_loss(student, teacher, kd_weight=weight, return_parts=True)
    for a, b, c in zip(parts, of_head, of_weights, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert torch.equal(a, c)
    with pytest.raises(ValueError, match="return_parts gives parts of rows that weigh something"):
        kd_loss(student, teacher, kd_weight=0.0, return_parts=True)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "two",
    [
        np.float32(2), np.int64(2), np.float64(2), torch.tensor(2), torch.tensor([2.0]), torch.tensor([[[2.0]]]),
        torch.full((2, 1), 2.0), torch.full((1, 3), 2.0), torch.full((2, 3, 1), 2.0), torch.full((2, 3), 2.0),
    ],
    ids=repr,
)  # fmt: skip
def test_numbers_of_every_kind(two):
    for name in ("temperature", "teacher_temperature", "kd_weight", "ce_weight", "z_weight"):
        options = {"ce_weight": 1.0, name: two}
        assert torch.allclose(kd_loss(S, T, Y, **options), kd_loss(S, T, Y, **{**options, name: 2.0})), name
    if isinstance(two, torch.Tensor) and two.is_floating_point():
        assert torch.allclose(kd_loss(S, T, row_weight=two), 2 * kd_loss(S, T))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_count_of_any_shape(shape):
    expected = kd_loss(S, T, Y, ce_weight=0.5, num_items=4)
    assert torch.equal(kd_loss(S, T, Y, ce_weight=0.5, num_items=torch.full(shape, 4)), expected)


def test_one_temperature_per_sample():
    tau = torch.tensor([[1.5], [3.0]])
    expected = kd_loss(S, T, temperature=tau.expand(2, 3).contiguous())
    assert torch.equal(kd_loss(S, T, temperature=tau), expected)
    assert torch.equal(kd_loss(S, T, temperature=tau[..., None]), expected)
    assert torch.equal(kd_loss(S[:, 0], T[:, 0], temperature=tau), kd_loss(S[:, 0], T[:, 0], temperature=tau[:, 0]))
    # Of shape (3,) it would be one per position, if PyTorch's broadcasting had its way.
    with pytest.raises(ValueError, match=r"temperature must be .*\(2, 3\), got \(3,\); one per sample is \(-1, 1\)"):
        kd_loss(S, T, temperature=torch.ones(3))


def test_parameters_are_numbers_where_nothing_is_trained():
    tau, teacher = nn.Parameter(torch.tensor(2.0)), nn.Parameter(T.clone())
    with torch.no_grad():
        ours = kd_loss(S, teacher, Y, temperature=tau, kd_weight=tau, ce_weight=tau, row_weight=nn.Parameter(Y + 0.5))
    assert torch.equal(ours, kd_loss(S, T, Y, temperature=2.0, kd_weight=2.0, ce_weight=2.0, row_weight=Y + 0.5))
    assert not ours.requires_grad
    with torch.inference_mode():
        assert torch.equal(kd_loss(S, teacher, temperature=tau), kd_loss(S, T, temperature=2.0))
    with pytest.raises(ValueError, match="temperature requires grad"):
        kd_loss(S, T, temperature=tau)


@pytest.mark.parametrize("items", [np.int64(4), np.float32(4), torch.tensor([4]), torch.tensor([[4.0]])], ids=repr)
def test_items_of_every_kind(items):
    assert torch.allclose(kd_loss(S, T, num_items=items), kd_loss(S, T, num_items=4))


def test_a_step_of_which_no_row_counts_has_no_items():
    student, nothing = S.clone().requires_grad_(), torch.full((2, 3), -100)
    loss = kd_loss(student, T, nothing, num_items=(nothing != -100).sum())
    loss.backward()
    assert loss == 0.0
    assert (student.grad == 0.0).all()


NUMBERS = {
    "num_items of two": (lambda: kd_loss(S, T, num_items=torch.tensor([3, 4])), ValueError, r"num_items.*\(2,\).*sum"),
    "negative kd_weight": (lambda: kd_loss(S, T, kd_weight=-1.0), ValueError, "kd_weight must not be negative, got -1"),
    "negative ce_weight": (lambda: kd_loss(S, T, Y, ce_weight=-1), ValueError, "ce_weight must not be negative"),
    "negative z_weight": (lambda: kd_loss(S, T, z_weight=-0.1), ValueError, "z_weight must not be negative"),
    "negative 0-d": (lambda: kd_loss(S, T, kd_weight=torch.tensor(-1.0)), ValueError, "kd_weight must not be negative"),
    "zero 0-d": (lambda: kd_loss(S, T, temperature=torch.tensor(0)), ValueError, "temperature must be positive"),
    "nan": (lambda: kd_loss(S, T, z_weight=math.nan), ValueError, "z_weight must be finite, got nan"),
    "beyond float": (lambda: kd_loss(S, T, kd_weight=10**400), ValueError, "kd_weight must be finite"),
    "negative items": (lambda: kd_loss(S, T, num_items=torch.tensor(-3)), ValueError, "num_items must not be negative"),
    "nan items": (lambda: kd_loss(S, T, num_items=math.nan), ValueError, "num_items must be positive"),
    "mask as temperature": (lambda: kd_loss(S, T, temperature=Y > 2), TypeError, "temperature must be a number"),
    "a number": (lambda: kd_loss(S, T, row_weight=2.0), TypeError, "row_weight must be a tensor.*got float.*kd_weight"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_that_are_none(case):
    call, error, message = NUMBERS[case]
    with pytest.raises(error, match=message):
        call()


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_integers_of_any_width_are_indices(dtype):
    options = {"ce_weight": 0.5, "shift": True}
    for divergence in ("forward_kl", "dkd"):
        ours = loss_and_gradient(S, T, Y.to(dtype), divergence=divergence, **options)
        assert torch.equal(ours[1], loss_and_gradient(S, T, Y, divergence=divergence, **options)[1])
    ignored = kd_loss(S, T, Y.masked_fill(Y == 6, 255).to(torch.uint8), ignore_index=255, ce_weight=1.0)
    assert torch.equal(ignored, kd_loss(S, T, Y.masked_fill(Y == 6, -100), ce_weight=1.0))


HOT = F.one_hot(Y, 7)
LABELS = {
    "int one-hot": (S, HOT, ValueError, r"\(2, 3\) for this student, got \(2, 3, 7\); one-hot.*labels.float\(\)"),
    "bool one-hot": (S, HOT.bool(), TypeError, r"got torch.bool; one-hot labels are probabilities: labels.float\(\)"),
    "float indices": (S, Y.float(), ValueError, r"\(2, 3, 7\), got \(2, 3\); class indices.*labels.long\(\)"),
    "kept dimension": (S, Y[..., None], ValueError, r"got \(2, 3, 1\); without the last.*labels.squeeze\(-1\)"),
    "float column": (S[0], torch.rand(3, 1), ValueError, r"student's shape \(3, 7\), got \(3, 1\)"),
    "images": (torch.randn(2, 7, 4, 5), torch.zeros(2, 4, 5).long(), ValueError, r"student.movedim\(1, -1\)"),
    "series": (torch.randn(2, 7, 4), torch.zeros(2, 4).long(), ValueError, r"student.movedim\(1, -1\)"),
    "-1 is not ignored": (S, Y - 1, ValueError, r"in \[0, 7\) or ignore_index -100, got -1 among values from -1 to 5"),
    "one too many": (S, Y + 1, ValueError, r"labels must be in \[0, 7\).*got 7 among values from 1 to 7"),
    "multi-hot": (S, (HOT + HOT.roll(1, -1)).float(), ValueError, "rows that sum to 1, got a sum of 2"),
    "negative probability": (S, HOT * 2.0 - HOT.roll(1, -1), ValueError, "values down to -1"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_none(case):
    student, labels, error, message = LABELS[case]
    with pytest.raises(error, match=message):
        kd_loss(student, torch.randn(student.shape), labels, ce_weight=1.0)


def test_labels_that_only_mark_rows():
    """Under pure KD a label beyond the student's classes is no mistake; one that nobody ignores is."""
    assert torch.equal(kd_loss(S, T, Y + 90), kd_loss(S, T))
    with pytest.raises(ValueError, match="got -1"):
        kd_loss(S, T, Y.masked_fill(Y == 6, -1))
    assert kd_loss(S, T, Y.masked_fill(Y == 6, -1), ignore_index=-1).isfinite()


def test_distributions_that_are_labels():
    smooth, weight = torch.full((2, 3, 7), 1 / 7), torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    for probs in (smooth, smooth.bfloat16(), 0.3 * HOT + 0.7 * HOT.flip(0), torch.rand(2, 3, 7).softmax(-1)):
        ours = kd_loss(S, T, probs.to(S.dtype), kd_weight=0.0, ce_weight=1.0)
        assert torch.allclose(ours, -(probs * S.log_softmax(-1)).sum(-1).mean())
    none = smooth * weight[..., None]  # a row of zeros has no label, and no cross-entropy
    assert torch.allclose(kd_loss(S, T, none, ce_weight=1.0), kd_loss(S, T) - (none * S.log_softmax(-1)).sum(-1).mean())
    wrong = smooth.clone()
    wrong[0, 1] = 5.0
    ours = kd_loss(S, T, wrong, ce_weight=1.0, row_weight=weight)
    assert torch.equal(ours, kd_loss(S, T, smooth, ce_weight=1.0, row_weight=weight))


# ---- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns", [(10, 100), (100, 10), (7, 8), (10, 1), (1000, 1001), (1000, 1100), (32000, 50257), (128256, 32000)]
)
def test_a_teacher_of_another_vocabulary_is_refused(columns):
    with pytest.raises(ValueError, match=f"student has {columns[0]} classes, the teacher {columns[1]}.*vocab=.shared"):
        check_vocabularies(*columns, "same")
    check_vocabularies(*columns, "shared")


@pytest.mark.parametrize(
    "columns", [(151936, 152064), (50257, 50304), (32000, 32001), (32064, 32000), (49152, 49152), (1000, 1024), (3, 3)]
)
def test_padding_is_no_other_vocabulary(columns):
    check_vocabularies(*columns, "same")


def test_vocabularies_are_compared_wherever_a_teacher_comes_from():
    wide = torch.randn(2, 3, 70)
    soft = SoftLabels.topk(torch.zeros(6, 1).long(), torch.zeros(6, 1), torch.full((6,), -math.inf), vocab_size=70)
    for teacher in (wide, Head(torch.randn(2, 3, 4), torch.randn(70, 4)), SoftLabels.dense(wide.flatten(0, 1)), soft):
        for student in (S, Head(torch.randn(2, 3, 4), torch.randn(7, 4))):
            with pytest.raises(ValueError, match="student has 7 classes, the teacher 70"):
                kd_loss(student, teacher)
    expected = kd_loss(S, wide[..., :7])
    assert torch.allclose(kd_loss(S, wide, vocab="shared"), expected)
    assert torch.allclose(KDLoss(vocab="shared")(S, wide), expected)
    assert torch.allclose(KD(vocab="shared", temperature=1.0, kd_weight=1.0, ce_weight=0.0)(_step(S, wide)), expected)
    for vocab, error in (("other", ValueError), (None, TypeError), (3, TypeError)):
        with pytest.raises(error, match='vocab must be "same" or "shared"'):
            kd_loss(S, T, vocab=vocab)


def _step(student, teacher):
    from kdfast.distill import Step

    return Step(student, teacher, None)


def test_one_logit_is_refused_and_two_classes_are_its_sigmoid():
    z, t, y = torch.randn(5, 1), torch.randn(5, 1), torch.tensor([0, 1, 1, 0, 1])
    with pytest.raises(ValueError, match=r"one logit per row.*torch.stack\(\(torch.zeros_like\(z\), z\), -1\)"):
        kd_loss(z, t)
    two = [torch.stack((torch.zeros_like(x), x), -1)[:, 0] for x in (z, t)]
    ours = kd_loss(*two, y, kd_weight=0.0, ce_weight=1.0)
    assert torch.allclose(ours, F.binary_cross_entropy_with_logits(z[:, 0], y.float()))
    p = t.sigmoid()
    bce = F.binary_cross_entropy_with_logits(z, p)
    assert torch.allclose(kd_loss(*two, divergence="soft_ce"), bce)
    assert torch.allclose(kd_loss(z, t, divergence="logit_mse"), (z - t).square().mean())  # a regression
    for options in ({"ce_weight": 1.0}, {"divergence": Divergence("logit_mse", standardize=True)}):
        with pytest.raises(ValueError, match="one logit per row"):
            kd_loss(z, t, torch.ones(5, 1), **{"divergence": "logit_mse", **options})


# ---- probabilities in logits' place ---------------------------------------------------------------------------------


def test_probabilities_are_found_at_each_new_place():
    for _ in range(2):  # until the place is in order
        with pytest.raises(ValueError, match=r"teacher holds probabilities.*leave the softmax out"):
            kd_loss(S, T.softmax(-1))
    with pytest.raises(ValueError, match="student holds probabilities"):
        kd_loss(S.softmax(-1), T)
    with pytest.raises(ValueError, match="teacher holds probabilities"):
        kd_loss(S, SoftLabels.dense(T.softmax(-1).flatten(0, 1)))
    with pytest.raises(ValueError, match="teacher holds probabilities"):
        KDLoss(temperature=2.0)(S, T.softmax(-1))


def test_an_empty_first_call_has_shown_nothing():
    def call(teacher):
        return kd_loss(S[0, : len(teacher)], teacher)

    call(T[0, :0])
    with pytest.raises(ValueError, match="teacher holds probabilities"):
        call(T[0].softmax(-1))


def test_rows_of_padding_hide_no_probabilities():
    for padded in (0, 2):
        probs = T[0].softmax(-1)
        probs[padded] = 0.0
        with pytest.raises(ValueError, match="teacher holds probabilities"):
            kd_loss(S[0], probs)


@pytest.mark.parametrize("make", [lambda p, t: (p, t), lambda p, t: (p.log(), t)], ids=["log_probs", "tails"])
def test_probabilities_in_soft_labels_are_found_at_a_new_place(make):
    probs, ids = T[0].softmax(-1).topk(3)
    log_probs, tails = make(probs, 1 - probs.sum(-1))
    labels = SoftLabels.topk(ids, log_probs, tails, vocab_size=7)
    with pytest.raises(ValueError, match="of topk soft labels"):
        kd_loss(S[0], labels)
    # Entries are normalised to what the tail leaves: logits do as well as log-probabilities.
    expected = kd_loss(S[0], SoftLabels.topk(ids, probs.log(), (1 - probs.sum(-1)).log(), vocab_size=7))
    logits = SoftLabels.topk(ids, probs.log() + 9.0, (1 - probs.sum(-1)).log(), vocab_size=7)
    assert torch.allclose(kd_loss(S[0], logits), expected, atol=1e-6)


def test_probabilities_are_found_in_every_call_on_request(monkeypatch):
    labels = SoftLabels.dense(T.softmax(-1).flatten(0, 1))
    for check in ("0", "1"):
        monkeypatch.setenv("KDFAST_CHECK", check)
        for teacher in (T, T.softmax(-1), labels):  # the first call of the line is in order
            found = teacher is not T and check == "1"
            with pytest.raises(ValueError, match="teacher holds probabilities") if found else nullcontext():
                kd_loss(S, teacher)


def test_what_may_be_logits_is_none_of_it():
    assert look_like_probabilities(T.softmax(-1))
    assert look_like_probabilities(torch.tensor([0.3, 0.7]))
    # A bias alone, whose softmax is itself, and one row of two logits that nearly sum to 1.
    for logits in (torch.full((3, 2), 0.5), torch.full((3, 7), 1 / 7), torch.tensor([[0.3, 0.705]])):
        assert not look_like_probabilities(logits)
    for logits in (HOT.float(), T, T.log_softmax(-1), torch.zeros(3, 7), torch.full((3, 7), 0.2), T[:0]):
        assert not look_like_probabilities(logits)
    assert kd_loss(S, HOT.float()).isfinite()


CHECKED = {
    "probabilities as log_probs": (lambda p, t: (p, t), "log_probs of topk soft labels must not be positive"),
    "a tail's probability": (lambda p, t: (p.log(), t), "tails of topk soft labels are logarithms"),
    "too much": (lambda p, t: (p.log() / 9, t.log()), "at most the probability 1, got"),
}


@pytest.mark.parametrize("case", CHECKED)
def test_probabilities_in_soft_labels_are_found_on_request(case, monkeypatch):
    make, message = CHECKED[case]
    probs, ids = T[0].softmax(-1).topk(3)
    log_probs, tails = make(probs, 1 - probs.sum(-1))
    labels = SoftLabels.topk(ids, log_probs, tails, vocab_size=7)
    monkeypatch.setenv("KDFAST_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        kd_loss(S[0], labels)
    right = SoftLabels.topk(ids, probs.log(), (1 - probs.sum(-1)).log(), vocab_size=7)
    assert kd_loss(S[0], right).isfinite()
    with pytest.raises(ValueError, match="weights must not be negative, got -"):
        kd_loss(S[0], SoftLabels.weights(ids, probs.log(), vocab_size=7), divergence="soft_ce")


# ---- a teacher that is trained --------------------------------------------------------------------------------------


def test_a_heads_parameters_are_constants_of_a_teacher():
    layer, hidden = nn.Linear(4, 7), torch.randn(2, 3, 4)
    student = S.clone().requires_grad_()
    loss = kd_loss(student, Head(hidden, layer.weight, layer.bias))
    loss.backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    with torch.no_grad():
        expected = layer(hidden)
    assert torch.allclose(loss, kd_loss(S, expected), atol=1e-6)
    for head in (Head(hidden, layer.weight * 1.0), Head(hidden, layer.weight, layer.bias + 0.0)):
        with pytest.raises(ValueError, match="teacher requires grad"):
            kd_loss(S, head)
    with torch.no_grad():
        assert kd_loss(S, Head(hidden, layer.weight * 1.0)).isfinite()


def test_soft_labels_that_are_trained_are_refused():
    logits = T.flatten(0, 1).clone().requires_grad_()
    ids = torch.arange(7).expand(6, 7)
    topk = SoftLabels.topk(ids, logits.log_softmax(-1), torch.full((6,), -math.inf), vocab_size=7)
    for labels in (SoftLabels.dense(logits), topk, SoftLabels.hidden(logits, vocab_size=7)):
        with pytest.raises(ValueError, match="soft labels of the teacher require grad"):
            kd_loss(S, labels)
    with torch.no_grad():
        assert torch.allclose(kd_loss(S, topk), kd_loss(S, T), atol=1e-6)


# ---- options without effect, and names ------------------------------------------------------------------------------


def test_smoothing_that_weighs_nothing_is_said():
    with pytest.warns(UserWarning, match="label_smoothing=0.3 has no effect, because ce_weight is 0"):
        kd_loss(S, T, Y, label_smoothing=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd_loss(S, T, Y, label_smoothing=0.3, ce_weight=1e-3)
        KD(ce_weight=lambda step: 0.0, label_smoothing=0.3)(_step(S, T))  # where a schedule ends


NAMES = {
    "alpha": (lambda: KDLoss(alpha=0.5), TypeError, "kd_loss has no option alpha: did you mean ce_weight or kd_weight"),
    "T": (lambda: KDLoss(T=4.0), TypeError, "no option T: did you mean temperature"),
    "tempereture": (lambda: KD(tempereture=4.0), TypeError, "KD has no option tempereture: did you mean temperature"),
    "mask": (lambda: KDLoss(attention_mask=Y), TypeError, "did you mean row_weight"),
    "at a call": (lambda: KDLoss()(S, T, tau=2.0), TypeError, "no option tau: did you mean temperature"),
    "two": (
        lambda: KD(alpha=1, xyzzy=2),
        TypeError,
        "no option alpha, xyzzy: did you mean ce_weight.*it has backward, ce_weight",
    ),
    "nothing like it": (lambda: KDLoss(xyzzy=1), TypeError, "no option xyzzy: it has backward, ce_weight"),
    "positional": (lambda: kd_loss(S, T, 4.0), TypeError, "labels must be a tensor.*got float"),
    "keyword": (lambda: kd_loss(S, T, alpha=0.5), TypeError, "no option alpha: did you mean ce_weight or kd_weight"),
    "of another loss": (lambda: margin_ce(S, Y, T=2.0), TypeError, "no option T: did you mean temperature"),
    "kl": (lambda: kd_loss(S, T, divergence="kl"), ValueError, "did you mean forward_kl"),
    "KL-Div": (lambda: Divergence("KL-Div"), ValueError, "did you mean forward_kl"),
    "kldiv": (lambda: Divergence("kldiv"), ValueError, "did you mean forward_kl"),
    "js": (lambda: KDLoss(divergence="js")(S, T), ValueError, "did you mean jsd"),
    "rkl": (lambda: Divergence("rkl"), ValueError, "did you mean reverse_kl"),
    "reverse-kl": (lambda: Divergence("reverse-kl"), ValueError, "did you mean reverse_kl"),
    "forwrd_kl": (lambda: Divergence("forwrd_kl"), ValueError, "did you mean forward_kl"),
    "mse": (lambda: Divergence("mse"), ValueError, "did you mean logit_mse"),
    "batchmean": (lambda: kd_loss(S, T, reduction="batchmean"), ValueError, 'did you mean "mean"'),
    "avg": (lambda: kd_loss(S, T, reduction="avg"), ValueError, 'did you mean "mean"'),
    "none": (lambda: kd_loss(S, T, reduction=None), TypeError, 'did you mean "none"'),
    "summ": (lambda: kd_loss(S, T, reduction="summ"), ValueError, "did you mean sum"),
    "weights under kl": (
        lambda: kd_loss(S[0], SoftLabels.weights(Y[:1].T, torch.rand(3, 1), vocab_size=7)),
        ValueError,
        'divergence="soft_ce"',
    ),
    "a of reverse_kl": (lambda: Divergence("reverse_kl", a=9.0), ValueError, "reverse_kl has no parameter a, got 9.0"),
    "b of jsd": (lambda: Divergence("jsd", b=0.5), ValueError, "jsd has no parameter b"),
    "nan of jsd": (lambda: jsd(math.nan), ValueError, "must be finite, got nan"),
    "a string": (lambda: Divergence("jsd", a="0.5"), TypeError, "jsd: beta must be a number, got str"),
    "no flag": (lambda: Divergence("jsd", standardize=1.0), TypeError, "standardize must be a bool, got float"),
    "no name": (lambda: Divergence(["jsd"]), TypeError, "must be a string, got list"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_are_nearly_right(case):
    call, error, message = NAMES[case]
    with pytest.raises(error, match=message):
        call()


# ---- wrong types ----------------------------------------------------------------------------------------------------

WRONG = [
    None, "2", [1.0], {}, object(), np.ones(3), math.nan, -3, 2.5, True, 1j, torch.ones(3), 1j * torch.ones(2, 3, 7)
]  # fmt: skip


@pytest.mark.parametrize("name", ["student", "teacher", "labels", *kd_loss.__kwdefaults__])
def test_every_argument_of_a_wrong_type_is_named(name):
    refused = 0
    for value in WRONG:
        error = _error({"student": S, "teacher": T, "labels": Y, "ce_weight": 0.5, name: value})
        refused += error is not None
        assert error is None or name in error, (value, error)
    assert refused


def _error(arguments):
    """What a call says against its arguments; None if it takes them. Other errors are none of its kind."""
    try:
        kd_loss(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return None
