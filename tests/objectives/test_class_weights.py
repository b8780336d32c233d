"""Class weights are the terms': value and gradient by hand, whichever way the teacher comes."""

import math

import pytest
import torch

from kdfast import Head, SoftLabels, kd_loss
from kdfast.objectives import class_weighted_ce


def exact(student, teacher, weight, temperature=1.0):
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return -(temperature**2) * (weight * p * log_q).sum(-1).mean()


def batch(*rows):
    student, teacher = torch.randn(*rows, 7).double().requires_grad_(), torch.randn(*rows, 7).double()
    return student, teacher, torch.rand(7).double()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient(temperature):
    student, teacher, weight = batch(2, 3)
    for w in (weight, torch.rand(2, 3, 7).double()):
        loss = class_weighted_ce(student, teacher, w, temperature=temperature)
        assert torch.allclose(loss, exact(student, teacher, w, temperature))
        assert torch.autograd.gradcheck(
            lambda s, w=w: class_weighted_ce(s, teacher, w, temperature=temperature, reduction="none"), student
        )


def test_gradient_is_mass_times_q_less_weighted_p():
    student, teacher, weight = batch(4)
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    (grad,) = torch.autograd.grad(class_weighted_ce(student, teacher, weight, reduction="sum"), student)
    assert torch.allclose(grad, (weight * p).sum(-1, keepdim=True) * q - weight * p)


def test_weights_of_one_are_soft_cross_entropy():
    student, teacher, _ = batch(4)
    assert torch.allclose(
        class_weighted_ce(student, teacher, torch.ones(7)), kd_loss(student, teacher, divergence="soft_ce")
    )


def test_weights_are_not_normalised():
    student, teacher, weight = batch(4)
    once, thrice = (class_weighted_ce(student, teacher, w) for w in (weight, 3 * weight))
    assert torch.allclose(3 * once, thrice)


def test_sparse_weights_are_the_dense_loss():
    student, teacher, weight = batch(4)
    p = teacher.softmax(-1)
    entries = SoftLabels.weights(torch.arange(7).expand(4, 7), p, vocab_size=7)
    for w in (weight, torch.rand(4, 7).double()):
        sparse = class_weighted_ce(student, entries, w)
        assert torch.allclose(sparse, exact(student, teacher, w), rtol=1e-6)
    ragged = SoftLabels.weights(
        torch.tensor([3, 0, 6]), torch.tensor([2.0, 1.0, 0.5]), vocab_size=7, offsets=torch.tensor([0, 1, 1, 3, 3])
    )
    log_q = student.log_softmax(-1)
    w = torch.rand(4, 7).double()
    by_hand = -(2.0 * w[0, 3] * log_q[0, 3] + w[2, 0] * log_q[2, 0] + 0.5 * w[2, 6] * log_q[2, 6]) / 4
    assert torch.allclose(class_weighted_ce(student, ragged, w), by_hand)


def test_a_weight_of_zero_takes_a_class_out():
    student, teacher, weight = batch(4)
    weight[2] = 0.0
    assert torch.allclose(class_weighted_ce(student, teacher, weight), exact(student, teacher, weight))
    loss = class_weighted_ce(student, teacher, torch.zeros(7))
    assert loss == 0.0
    assert (torch.autograd.grad(loss, student)[0] == 0.0).all()


def test_masked_classes():
    student, teacher, weight = batch(4)
    masked = torch.cat([teacher, torch.full((4, 1), -math.inf).double()], dim=1)
    wider = torch.cat([student, torch.full((4, 1), -math.inf).double()], dim=1)
    loss = class_weighted_ce(wider, masked, torch.cat([weight, weight[:1]]))
    assert torch.allclose(loss, exact(student, teacher, weight))


def test_a_head_is_its_logits():
    hidden, weight = torch.randn(4, 3), torch.randn(7, 3)
    teacher, classes = torch.randn(4, 7), torch.rand(7)
    from_head = class_weighted_ce(Head(hidden, weight), teacher, classes)
    assert torch.allclose(from_head, class_weighted_ce(hidden @ weight.T, teacher, classes), rtol=1e-5)


def test_labels_with_a_tail_are_refused():
    student, teacher, weight = batch(4)
    ids = torch.tensor([[0, 3]] * 4)
    topk = SoftLabels.topk(ids, teacher.log_softmax(-1).gather(1, ids), torch.full((4,), -1.0), vocab_size=7)
    with pytest.raises(ValueError, match="topk soft labels do not hold the logits of whole rows"):
        class_weighted_ce(student, topk, weight)
