"""SoftLabels: rows, ragged entries, temperatures."""

import math
from itertools import pairwise

import pytest
import torch

from kdfast import SoftLabels, kd_loss


def ragged():
    """Rows of 2, 0, 3 and 1 entries."""
    ids = torch.tensor([4, 1, 0, 2, 3, 6])
    values = torch.tensor([-1.0, -2.0, -0.5, -3.0, -2.5, -0.1])
    offsets = torch.tensor([0, 2, 2, 5, 6])
    tails = torch.tensor([[-0.8, 0.0, -1.5, -2.0], [-0.7, 0.0, -1.0, -1.5]])
    return SoftLabels.topk(ids, values, tails, vocab_size=7, temperatures=(1.0, 2.0), offsets=offsets)


def rows_of(labels):
    """Each row as what it holds."""
    bounds = labels.offsets.tolist()
    return [
        (labels.ids[a:b].tolist(), labels.values[a:b].tolist(), labels.tails[:, i].tolist())
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 3), [1, 2]),
        ([3, 0, 3], [3, 0, 3]),
        (torch.tensor([2, 2, 1]), [2, 2, 1]),
        (torch.tensor([True, False, True, False]), [0, 2]),
        (2, [2]),
        (-1, [3]),
    ],
    ids=str,
)
def test_rows_are_indexed_like_a_tensor(index, rows):
    source = rows_of(ragged())
    assert rows_of(ragged()[index]) == [source[i] for i in rows]


def test_cat_undoes_slicing():
    labels = ragged()
    assert rows_of(SoftLabels.cat([labels[:1], labels[1:3], labels[3:]])) == rows_of(labels)
    dense = SoftLabels.dense(torch.randn(4, 7), present=torch.tensor([True, False, True, True]))
    both = SoftLabels.cat([dense[:2], dense[2:]])
    assert torch.equal(both.values, dense.values)
    assert torch.equal(both.present, dense.present)


def test_entries_and_tail_are_a_distribution_at_each_temperature():
    labels = ragged()
    for temperature in labels.temperatures:
        weights, tail = labels.at(temperature)
        sums = torch.stack([weights[a:b].sum() for a, b in pairwise(labels.offsets.tolist())])
        has_entries = torch.tensor([True, False, True, True])
        assert torch.allclose((sums + tail.exp())[has_entries], torch.ones(3))
        # Tempered: the entries keep their ratios, to the power of 1 / T.
        assert torch.allclose(weights[0] / weights[1], torch.tensor(1.0 / temperature).exp())


def test_uniform_and_ragged_rows_agree():
    log_probs, ids = torch.randn(5, 30).log_softmax(1).topk(6)
    tails = torch.rand(5).log()
    uniform = SoftLabels.topk(ids, log_probs, tails, vocab_size=30)
    flat = SoftLabels.topk(ids.flatten(), log_probs.flatten(), tails, vocab_size=30, offsets=torch.arange(6) * 6)
    assert uniform.width == 6
    assert flat.width is None
    assert torch.allclose(uniform.at(1.0)[0], flat.at(1.0)[0])


def test_impossible_entries_weigh_nothing():
    values = torch.tensor([[-1.0, -math.inf], [-math.inf, -math.inf]])
    labels = SoftLabels.topk(torch.tensor([[0, 1], [2, 3]]), values, torch.tensor([-0.5, 0.0]), vocab_size=5)
    weights, _ = labels.at(1.0)
    assert weights[1] == 0.0
    assert (weights[2:] == 0.0).all()
    assert kd_loss(torch.randn(2, 5), labels).isfinite()


def test_absent_rows_leave_the_denominator():
    student, teacher = torch.randn(4, 7), torch.randn(4, 7)
    present = torch.tensor([True, False, True, False])
    absent = kd_loss(student, SoftLabels.dense(teacher, present=present))
    assert torch.allclose(absent, kd_loss(student[present], teacher[present]))
    rows = kd_loss(student, SoftLabels.dense(teacher, present=present), reduction="none")
    assert (rows[~present] == 0.0).all()


def test_dense_labels_are_teacher_logits():
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    labels = SoftLabels.dense(teacher.view(6, 7))
    for options in ({"temperature": 2.0}, {"divergence": "jsd", "teacher_temperature": 3.0}):
        assert torch.equal(kd_loss(student, labels, **options), kd_loss(student, teacher, **options))


def test_moves_and_says_what_it_is():
    labels = ragged()
    assert labels.to("meta").device.type == "meta"
    assert labels.device.type == "cpu"
    assert repr(labels) == "SoftLabels(topk, rows=4, vocab_size=7, entries=6, temperatures=(1.0, 2.0))"
    assert len(labels) == 4


IDS, PROBS = torch.tensor([[2, 3]]), torch.tensor([[0.5, 0.3]])
TAIL, TABLE = torch.tensor([0.2]).log(), torch.ones(1, 8)


@pytest.mark.parametrize("wide", [2**32 + 5, -(2**32) + 5, 2**40, -1])
def test_ids_of_64_bits_do_not_come_round(wide):
    ids = torch.tensor([[wide, 3]])
    for make in (
        lambda: SoftLabels.topk(ids, PROBS.log(), TAIL, vocab_size=8),
        lambda: SoftLabels.weights(ids, PROBS, vocab_size=8),
        lambda: SoftLabels.prototype(ids, PROBS, TAIL, torch.tensor([0]), TABLE, vocab_size=8),
    ):
        with pytest.raises(ValueError, match=r"tokens in \[0, 8\)"):
            make()
    padded = SoftLabels.topk(ids, torch.tensor([[-math.inf, -0.5]]), TAIL, vocab_size=8)
    alone = SoftLabels.topk(ids[:, 1:], torch.tensor([[-0.5]]), TAIL, vocab_size=8)
    student = torch.arange(8.0)[None]
    assert torch.equal(kd_loss(student, padded), kd_loss(student, alone))


WRONG = {
    "ids": lambda: SoftLabels.topk([[2, 3]], PROBS.log(), TAIL, vocab_size=8),
    "values": lambda: SoftLabels.topk(IDS, [[-0.7, -1.2]], TAIL, vocab_size=8),
    "tails": lambda: SoftLabels.topk(IDS, PROBS.log(), [-1.6], vocab_size=8),
    "offsets": lambda: SoftLabels.weights(IDS[0], PROBS[0], vocab_size=8, offsets=[0, 2]),
    "temperatures": lambda: SoftLabels.topk(IDS, PROBS.log(), TAIL, vocab_size=8, temperatures=1.0),
    "temperature": lambda: SoftLabels.weights(IDS, PROBS, vocab_size=8, temperature="1"),
    "vocab_size": lambda: SoftLabels.weights(IDS, PROBS, vocab_size="8"),
    "vocab_size must be an integer, got float": lambda: SoftLabels.weights(IDS, PROBS, vocab_size=8.7),
    "prototype_ids": lambda: SoftLabels.prototype(IDS, PROBS, TAIL, [0], TABLE, vocab_size=8),
    "prototypes": lambda: SoftLabels.prototype(IDS, PROBS, TAIL, torch.tensor([0]), [[0.1] * 8], vocab_size=8),
    "log_probs": lambda: SoftLabels.dense([[-1.0, -0.5]]),
    "hidden": lambda: SoftLabels.hidden([[1.0]], vocab_size=8),
    "head": lambda: SoftLabels.hidden(torch.ones(1, 4), torch.nn.Linear(4, 8)),
    "SoftLabels.cat": lambda: SoftLabels.cat([torch.ones(2)]),
    "row numbers": lambda: ragged()[torch.tensor([0.5])],
    "rows are": lambda: ragged()[None],
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_a_wrong_type_are_named(name):
    with pytest.raises(TypeError, match=name):
        WRONG[name]()
