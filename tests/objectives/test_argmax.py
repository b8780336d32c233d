"""The teacher's hard labels, from logits and from every kind of soft labels that has them."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdfast import Head, OutputLayer, SoftLabels, kd_loss
from kdfast.objectives import teacher_argmax, teacher_argmax_ce


def batch():
    return torch.randn(5, 9).double().requires_grad_(), torch.randn(5, 9).double()


def sparse(teacher, k=3):
    log_probs, ids = teacher.log_softmax(-1).topk(k)
    # The likeliest is not the first entry.
    ids, log_probs = ids.flip(1), log_probs.flip(1)
    return ids, log_probs, torch.log1p(-log_probs.exp().sum(1))


def kinds(teacher):
    ids, log_probs, tails = sparse(teacher)
    shape, prototypes = torch.zeros(5, dtype=torch.long), torch.full((1, 9), 1 / 9)
    head = OutputLayer(torch.eye(9))
    return {
        "dense": SoftLabels.dense(teacher),
        "hidden": SoftLabels.hidden(teacher.float(), head),
        "topk": SoftLabels.topk(ids, log_probs, tails, vocab_size=9, temperatures=(2.0,)),
        "prototype": SoftLabels.prototype(ids, log_probs.exp(), tails, shape, prototypes, vocab_size=9),
    }


@pytest.mark.parametrize("kind", ["dense", "hidden", "topk", "prototype"])
def test_labels_have_the_logits_argmax(kind):
    student, teacher = batch()
    labels = kinds(teacher)[kind]
    assert torch.equal(teacher_argmax(labels), teacher.argmax(-1))
    expected = F.cross_entropy(student, teacher.argmax(-1))
    assert torch.allclose(teacher_argmax_ce(student, labels), expected)
    assert torch.allclose(teacher_argmax_ce(student, teacher), expected)


def test_gradient_is_cross_entropys():
    student, teacher = batch()
    (grad,) = torch.autograd.grad(teacher_argmax_ce(student, teacher, reduction="sum"), student)
    assert torch.allclose(grad, student.detach().softmax(-1) - F.one_hot(teacher.argmax(-1), 9))


def test_leading_dimensions():
    teacher = torch.randn(2, 3, 9)
    assert torch.equal(teacher_argmax(teacher), teacher.argmax(-1))
    student = torch.randn(2, 3, 9)
    assert teacher_argmax_ce(student, teacher, reduction="none").shape == (2, 3)


def test_a_surer_wrong_student_pays_more():
    """-sum t log max(q), which an article has, falls as the student gets sure of a wrong class."""
    teacher, sure = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[0.0, 4.0, 0.0]])
    assert teacher_argmax_ce(2 * sure, teacher) > teacher_argmax_ce(sure, teacher)
    assert -(2 * sure).softmax(-1).max().log() < -sure.softmax(-1).max().log()


def test_rows_that_say_nothing_do_not_count():
    student, teacher = batch()
    present = torch.tensor([True, False, True, True, False])
    labels = SoftLabels.dense(teacher, present=present)
    classes = teacher_argmax(labels)
    assert torch.equal(classes == -100, ~present)
    assert torch.allclose(teacher_argmax_ce(student, labels), F.cross_entropy(student, classes, ignore_index=-100))
    ragged = SoftLabels.topk(
        torch.tensor([4, 2]),
        torch.tensor([-2.0, -1.0]),
        torch.tensor([-1.0, 0.0]),
        vocab_size=9,
        offsets=torch.tensor([0, 2, 2]),
    )
    assert teacher_argmax(ragged).tolist() == [2, -100]
    assert teacher_argmax(ragged, ignore_index=-1).tolist() == [2, -1]


def test_a_prototype_without_entries_has_its_shapes_argmax():
    prototypes = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.3, 0.1]])
    none = torch.empty(2, 0)
    labels = SoftLabels.prototype(none.long(), none, torch.zeros(2), torch.tensor([1, 0]), prototypes, vocab_size=3)
    assert teacher_argmax(labels).tolist() == [0, 1]


def test_both_kinds_of_labels_in_one_sweep():
    student, teacher = batch()
    both = kd_loss(student, teacher, teacher_argmax(teacher), kd_weight=0.3, ce_weight=0.7)
    expected = 0.3 * kd_loss(student, teacher) + 0.7 * teacher_argmax_ce(student, teacher)
    assert torch.allclose(both, expected)


def test_options_of_kd_loss():
    student, teacher = batch()
    classes, tau = teacher.argmax(-1), torch.rand(5).double() + 0.5
    tempered = F.cross_entropy(student / 2.0, classes)
    assert torch.allclose(teacher_argmax_ce(student, teacher, temperature=2.0), 4 * tempered)
    rows = tau**2 * F.cross_entropy(student / tau[:, None], classes, reduction="none")
    assert torch.allclose(teacher_argmax_ce(student, teacher, temperature=tau), rows.mean())
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    from_head = teacher_argmax_ce(Head(hidden, weight), teacher.float())
    assert torch.allclose(from_head, F.cross_entropy(hidden @ weight.T, classes), rtol=1e-5)


def test_vocabularies_may_differ():
    """Cross-entropy sees all of the student's columns."""
    student, teacher = torch.randn(5, 12).double(), torch.randn(5, 9).double()
    expected = F.cross_entropy(student, teacher.argmax(-1))
    assert torch.allclose(teacher_argmax_ce(student, teacher), expected)
    # A class that the student lacks is a loss that nobody overlooks.
    assert teacher_argmax_ce(student, torch.tensor([[0.0] * 12 + [math.inf]] * 5)).isnan()


def test_draws_do_not_have_it():
    draws = SoftLabels.weights(torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1), vocab_size=9)
    with pytest.raises(ValueError, match=r"sampler's draws.*topk, prototype, dense and hidden"):
        teacher_argmax(draws)
