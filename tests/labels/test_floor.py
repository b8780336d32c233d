"""The parts of a loss say how far the teacher's labels lie from its rows, where that is known."""

import pickle

import pytest
import torch

from kdfast import SoftLabels, kd_loss
from kdfast.labels import Floor

COLUMNS = 5
FLOOR = Floor(0.4, 0.01, 2.0, 0.0, 9, 2.0)


def measured():
    """Labels whose floor was measured at temperature 2."""
    fields = SoftLabels.dense(torch.randn(4, COLUMNS)).to_fields()
    return SoftLabels.from_fields({**fields, "floor": FLOOR})


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_parts_of_a_loss_have_the_floor_of_its_labels(reduction):
    logits, labels = torch.randn(4, COLUMNS), measured()
    _, parts = kd_loss(logits, labels, temperature=2.0, reduction=reduction, return_parts=True)
    _, plain = kd_loss(logits, labels.values, temperature=2.0, reduction=reduction, return_parts=True)
    assert (parts.floor, plain.floor) == (0.4, None)
    assert len(parts) == 4
    assert parts._fields == ("kd", "ce", "entropy", "top1")
    assert all(map(torch.equal, parts, plain))
    assert pickle.loads(pickle.dumps(parts)).floor == 0.4


@pytest.mark.parametrize(
    "tau", [{}, {"temperature": torch.full((4,), 2.0)}, {"temperature": 2.0, "teacher_temperature": 1.0}]
)
def test_a_floor_of_another_temperature_is_none(tau):
    assert kd_loss(torch.randn(4, COLUMNS), measured(), **tau, return_parts=True)[1].floor is None


def test_labels_that_nobody_has_measured_have_none():
    labels = SoftLabels.dense(torch.randn(4, COLUMNS))
    assert kd_loss(torch.randn(4, COLUMNS), labels, return_parts=True)[1].floor is None


@pytest.mark.parametrize("fullgraph_of", [2.0, 1.0])
def test_parts_with_a_floor_compile(fullgraph_of):
    logits, labels = torch.randn(4, COLUMNS), measured()
    call = lambda x: kd_loss(x, labels, temperature=fullgraph_of, return_parts=True)  # noqa: E731
    loss, parts = torch.compile(call, fullgraph=True, backend="eager")(logits)
    want, theirs = call(logits)
    assert torch.equal(loss, want)
    assert parts.floor == theirs.floor == (0.4 if fullgraph_of == 2.0 else None)
