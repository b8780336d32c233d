"""What is refused, and that the reason is true."""

import pytest
import torch

from kdfast import kd_loss
from kdfast.objectives import inner_product_loss

P = torch.tensor([[0.4, 0.3, 0.3]], dtype=torch.float64)


def log_inner_product(q):
    return -(P * q).sum(-1).log()


def test_the_inner_product_is_refused():
    with pytest.raises(ValueError, match=r"optimum is the one-hot.*kd_loss.*teacher_argmax_ce.*entropy_matching"):
        inner_product_loss(P, P)


def test_its_optimum_is_the_argmax():
    one_hot = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    assert log_inner_product(P).item() == pytest.approx(1.0788, abs=5e-5)
    assert log_inner_product(one_hot).item() == pytest.approx(0.9163, abs=5e-5)


def test_descending_it_leaves_the_teacher_for_its_argmax():
    logits = P.log().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=5.0)
    for _ in range(500):
        optimizer.zero_grad()
        log_inner_product(logits.softmax(-1)).sum().backward()
        optimizer.step()
    assert logits.softmax(-1)[0, 0] > 0.99
    at_teacher = P.log().requires_grad_()
    (grad,) = torch.autograd.grad(kd_loss(at_teacher, P.log()), at_teacher)
    assert grad.abs().max() < 1e-12
