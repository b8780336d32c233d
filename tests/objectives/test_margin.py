"""Margins: no dead zone, and the gradient points to the label."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdfast.loss import label_values
from kdfast.objectives import margin_ce, pairwise_hinge


def gradient(loss, logits, labels, *arguments, **options):
    leaf = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, labels, *arguments, **options), leaf)[0]


def students_with(q):
    """(n, 3) log-probabilities, the label's q."""
    return torch.stack([q, (1 - q) * 0.7, (1 - q) * 0.3], dim=1).log()


def test_margin_ce_is_cross_entropy_of_lowered_logits():
    logits, labels = torch.randn(2, 5, 7).double(), torch.randint(0, 7, (2, 5))
    lowered = (logits - 0.7 * F.one_hot(labels, 7)).flatten(0, 1)
    assert torch.allclose(margin_ce(logits, labels, 0.7), F.cross_entropy(lowered, labels.flatten()))
    assert torch.allclose(margin_ce(logits, labels, 0.0), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: margin_ce(x, labels, 0.7, reduction="none"), leaf)


def test_hinge_is_torchs():
    logits, labels = torch.randn(2, 5, 7).double(), torch.randint(0, 7, (2, 5))
    theirs = 7 * F.multi_margin_loss(logits.flatten(0, 1), labels.flatten(), margin=0.7)
    assert torch.allclose(pairwise_hinge(logits, labels, 0.7), theirs)
    leaf = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pairwise_hinge(x, labels, 0.7, reduction="none"), leaf)


@pytest.mark.parametrize("loss", [margin_ce, pairwise_hinge])
def test_no_dead_zone_where_the_student_is_worst(loss):
    logits = students_with(torch.logspace(-12, -1, 12).double())
    labels = torch.zeros(12, dtype=torch.long)
    grad = gradient(loss, logits, labels, 2.0, reduction="sum")
    assert (grad[:, 0] < -0.5).all()
    assert (grad[:, 1:] > 0.0).all()
    # The worse the student, the larger the loss.
    assert (loss(logits, labels, 2.0, reduction="none").diff() < 0.0).all()


def test_the_articles_margin_has_one():
    """-sum t log(max(q - m, eps)) of the probabilities: a plateau of 18.42, without a gradient, wherever q < m."""

    def article(logits, labels):
        q = logits.softmax(-1).gather(-1, labels[:, None])
        return -(q - 0.1).clamp(min=1e-8).log().sum()

    labels = torch.zeros(1, dtype=torch.long)
    for q in (0.02, 0.05):
        logits = students_with(torch.tensor([q]).double())
        assert article(logits, labels).item() == pytest.approx(18.42, abs=5e-3)
        assert (gradient(article, logits, labels) == 0.0).all()
        assert gradient(margin_ce, logits, labels, 0.1)[0, 0] < -0.9


@pytest.mark.parametrize("loss", [margin_ce, pairwise_hinge])
def test_a_met_margin_is_paid_for_by_nothing_or_little(loss):
    logits, labels = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([0])
    assert loss(logits, labels, 1.0) < 1e-3 < loss(logits, labels, 9.5)


@pytest.mark.parametrize("loss", [margin_ce, pairwise_hinge])
def test_masked_columns(loss):
    logits, labels = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    masked = torch.cat([logits, torch.full((4, 2), -math.inf).double()], dim=1)
    assert torch.allclose(loss(masked, labels, 0.5), loss(logits, labels, 0.5))
    grad = gradient(loss, masked, labels, 0.5)
    assert torch.allclose(grad[:, :5], gradient(loss, logits, labels, 0.5))
    assert (grad[:, 5:] == 0.0).all()
    masked[0, 0] = -math.inf
    assert loss(masked, labels, 0.5) == math.inf


def test_a_bad_label_is_refused_or_makes_its_own_row_nan(monkeypatch):
    logits = torch.randn(3, 4)
    for loss in (margin_ce, pairwise_hinge):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 4\) .*got 7"):
            loss(logits, torch.tensor([0, 7, 3]))
    monkeypatch.setattr(label_values, "can_look", lambda x: False)  # as on a device
    for loss in (margin_ce, pairwise_hinge):
        rows = loss(logits, torch.tensor([0, 7, 3]), reduction="none")
        assert torch.equal(rows.isnan(), torch.tensor([False, True, False]))


def test_nan_logits_are_not_hidden():
    logits = torch.randn(3, 4)
    logits[1, 2] = math.nan
    for loss in (margin_ce, pairwise_hinge):
        rows = loss(logits, torch.tensor([0, 1, 3]), reduction="none")
        assert torch.equal(rows.isnan(), torch.tensor([False, True, False]))


def test_bfloat16_is_computed_in_float32():
    logits, labels = (torch.randn(6, 50) * 8).bfloat16(), torch.randint(0, 50, (6,))
    for loss in (margin_ce, pairwise_hinge):
        assert loss(logits, labels, 0.01).dtype == torch.float32
        assert torch.allclose(loss(logits, labels, 0.01).double(), loss(logits.double(), labels, 0.01), rtol=1e-6)


def test_with_shift_the_margin_is_taken_off_the_label_of_the_position():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.randint(7, (2, 5), generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = margin_ce(x, labels, 1.5, shift=True, row_weight=mask)
    counted = mask[:, 1:].bool()
    z, label = y[:, :-1][counted], labels[:, 1:][counted]
    expected = F.cross_entropy(z - 1.5 * F.one_hot(label, 7), label)
    loss.backward()
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-6)
    assert torch.allclose(x.grad, y.grad, atol=1e-6)
