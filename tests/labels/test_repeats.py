"""Ids that a row names more than once, and padding, whose ids do not matter."""

import math

import pytest
import torch
from torch import nn

from kdfast import SoftLabels, kd_loss
from kdfast.labels import repeats

S = torch.tensor([[0.0, 0, 1, 0, 0, 0, 0, 0]], dtype=torch.float64)


def value_and_gradient(f, x):
    leaf = x.clone().requires_grad_()
    value = f(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def test_weights_of_an_id_that_repeats_add_up():
    labels = SoftLabels.weights(torch.tensor([[2, 2, 2, 5]]), torch.full((1, 4), 0.25), vocab_size=8)
    loss, grad = value_and_gradient(lambda s: kd_loss(s, labels, divergence="soft_ce"), S)
    p = torch.tensor([0.0, 0, 0.75, 0, 0, 0.25, 0, 0], dtype=torch.float64)
    assert loss.item() == pytest.approx(-(p @ S[0].log_softmax(0)).item(), rel=1e-6) == pytest.approx(1.5240, abs=1e-4)
    torch.testing.assert_close(grad[0], S[0].softmax(0) - p, rtol=1e-6, atol=1e-9)
    assert grad[0, 2].item() == pytest.approx(-0.4703, abs=1e-4)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("looked_at", [True, False], ids=["cpu", "as on a gpu"])
def test_draws_with_replacement(ragged, looked_at, monkeypatch):
    """Random sampling KD: 50 draws with weights of 1/50, and a label that is among them."""
    if not looked_at:
        monkeypatch.setattr(repeats, "can_look", lambda x: False)
    rows, vocab, draws = 6, 40, 50
    teacher, student = torch.randn(rows, vocab) * 2, torch.randn(rows, vocab, dtype=torch.float64)
    ids = torch.multinomial(teacher.softmax(1), draws, replacement=True)
    weights = torch.full(ids.shape, 1 / draws)
    if ragged:
        offsets = torch.arange(rows + 1) * draws
        labels = SoftLabels.weights(ids.flatten(), weights.flatten(), vocab_size=vocab, offsets=offsets)
    else:
        labels = SoftLabels.weights(ids, weights, vocab_size=vocab)
    options = {"divergence": "soft_ce", "ce_weight": 0.5, "labels": ids[:, 0]}
    loss, grad = value_and_gradient(lambda s: kd_loss(s, labels, **options), student)
    p = torch.zeros(rows, vocab, dtype=torch.float64).scatter_add(1, ids, weights.double())

    def truth(s):
        return -(p * s.log_softmax(1)).sum(1).mean() + 0.5 * nn.functional.cross_entropy(s, ids[:, 0])

    for a, b in zip((loss, grad), value_and_gradient(truth, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_labels_made_of_draws_in_a_compiled_function():
    ids, student = torch.tensor([[2, 2, 2, 5]]), S.float()

    @torch.compile(backend="eager", fullgraph=True)
    def loss(s, weights):
        return kd_loss(s, SoftLabels.weights(ids, weights, vocab_size=8), divergence="soft_ce")

    assert loss(student, torch.full((1, 4), 0.25)).item() == pytest.approx(1.5240, abs=1e-4)


@pytest.mark.parametrize("label", [None, 3, 0])
@pytest.mark.parametrize("pad", [0, 1, 2, 3, 4, 8, -1, 2**31 - 1])
@pytest.mark.parametrize("width", [1, 9])
def test_padding_is_inert(pad, width, label):
    """Rows padded to a width with (any id, -inf), as collators do; more entries than columns, too."""
    student = torch.zeros(1, 8, dtype=torch.float64)
    student[0, 0] = 2.0
    ids = torch.tensor([[pad] * width + [3, 4] + [pad] * width])
    log_probs = torch.tensor([[-math.inf] * width + [math.log(0.6), math.log(0.3)] + [-math.inf] * width])
    labels = SoftLabels.topk(ids, log_probs, torch.tensor([math.log(0.1)]), vocab_size=8)
    options = {} if label is None else {"labels": torch.tensor([label]), "ce_weight": 0.5}
    loss, grad = value_and_gradient(lambda s: kd_loss(s, labels, **options), student)

    def truth(s):
        q = s[0].log_softmax(0)
        classes = torch.stack([q[3], q[4], q[[0, 1, 2, 5, 6, 7]].logsumexp(0)])
        p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
        return (p * (p.log() - classes)).sum() - (0.0 if label is None else 0.5 * q[label])

    for a, b in zip((loss, grad), value_and_gradient(truth, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    if label is None:
        assert loss.item() == pytest.approx(1.517, abs=1e-3)


@pytest.mark.parametrize("kind", ["topk", "prototype"])
def test_repeats_that_cannot_be_merged_are_refused(kind):
    ids, values, tails = torch.tensor([[1, 2], [4, 4]]), torch.full((2, 2), 0.25), torch.full((2,), -0.7)

    def make(ids, values, **options):
        if kind == "topk":
            return SoftLabels.topk(ids, values.log(), tails, vocab_size=8, **options)
        return SoftLabels.prototype(
            ids, values, tails, torch.zeros(2).long(), torch.ones(1, 8), vocab_size=8, **options
        )

    with pytest.raises(ValueError, match="got 4 twice in row 1; add up their probabilities"):
        make(ids, values)
    make(ids, values, present=torch.tensor([True, False]))  # nobody looks at that row
    make(ids, torch.tensor([[0.25, 0.25], [0.25, 0.0]]))  # one of them is padding


def test_entries_of_no_weight_stay_entries():
    """Behind a lead that float32's exponential does not reach, an entry is apart from its tail still."""
    student = torch.randn(1, 8, dtype=torch.float64)
    tail = torch.tensor([math.log(0.5)])
    labels = SoftLabels.topk(torch.tensor([[1, 2]]), torch.tensor([[0.0, -200.0]]), tail, vocab_size=8)
    loss, grad = value_and_gradient(lambda s: kd_loss(s, labels), student)

    def truth(s):
        q = s[0].log_softmax(0)
        return -0.5 * q[1] - 0.5 * q[[0, 3, 4, 5, 6, 7]].logsumexp(0) - math.log(2.0)

    for a, b in zip((loss, grad), value_and_gradient(truth, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_row_of_padding_alone_has_no_likeliest_class():
    values = torch.tensor([[-math.inf, -math.inf], [-1.0, -math.inf]])
    labels = SoftLabels.topk(torch.tensor([[5, 5], [3, 3]]), values, torch.tensor([0.0, -0.5]), vocab_size=8)
    assert labels.argmax().tolist() == [-1, 3]


def test_rows_of_entries_write_nothing_elsewhere():
    for offsets in ([0, 100, 6], [0, -5, 6], [7, 2**40, 1], [0, 6, 6]):
        row = repeats.rows_of_entries(torch.tensor(offsets), 6)
        assert row.min() >= 0
        assert row.max() <= 1
    assert repeats.rows_of_entries(torch.tensor([0, 0, 2, 2, 5]), 5).tolist() == [1, 1, 3, 3, 3]
