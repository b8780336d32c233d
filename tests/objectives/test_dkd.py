"""DKD where log(softmax) is -inf: against its definition in float64, from logsumexps alone."""

import pytest
import torch

from kdfast import dkd, kd_loss
from kdfast.testing import loss_and_gradient, relative_error


def decoupled(student, teacher, label, alpha, beta):
    """alpha KL(target, rest) + beta KL(within the rest), row by row."""
    losses = []
    for s, t, y in zip(student, teacher, label, strict=True):
        rest = torch.arange(len(s)) != y
        pairs = [torch.stack([z[y], z[rest].logsumexp(0)]).log_softmax(0) for z in (s, t)]
        within = [z[rest].log_softmax(0) for z in (s, t)]
        kl = [(p.exp() * (p - q)).sum() for q, p in (pairs, within)]
        losses.append(alpha * kl[0] + beta * kl[1])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_logits(scale, dtype):
    student, teacher, labels = scale * torch.randn(8, 10), scale * torch.randn(8, 10), torch.randint(0, 10, (8,))
    # Sure of the label, and sure of another: the target's and the rest's log-probability are 0 in turn.
    student[0, labels[0]] += 200.0
    teacher[1, labels[1]] += 200.0
    student[2, labels[2]] -= 200.0
    leaf = student.double().requires_grad_()
    exact = decoupled(leaf, teacher.double(), labels, 1.0, 8.0)
    (exact_grad,) = torch.autograd.grad(exact, leaf)
    loss, grad = loss_and_gradient(student.to(dtype), teacher.to(dtype), labels, divergence=dkd(1.0, 8.0))
    rounding = 1e-12 if dtype == torch.float64 else 2e-6
    assert grad.isfinite().all()
    assert relative_error(loss, exact.detach()) < rounding
    assert relative_error(grad, exact_grad) < rounding


def test_two_classes_are_refused_with_the_reason():
    """The rest is one class then, and KL within it is 0 / 0 in the authors' code."""
    with pytest.raises(ValueError, match=r"at least 3 classes \(the non-target part is empty of 2\), got 2"):
        kd_loss(torch.randn(4, 2), torch.randn(4, 2), torch.zeros(4, dtype=torch.long), divergence="dkd")
