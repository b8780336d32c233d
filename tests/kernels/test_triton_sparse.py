"""The sparse Triton kernels keep the laws of the sparse row op: entries, tails, and tails that have a prototype."""

import math

import pytest
import torch

pytest.importorskip("triton")

from kdfast.divergences import Divergence
from kdfast.kernels import launch, sparse
from kdfast.loss.dispatch import forms_of
from kdfast.loss.reference import Targets
from support import hostile
from support import prototype_rows as shaped
from support import sparse_rows as plain
from support.sparse_rows import check, run
from support.triton_device import DEVICE

# The interpreter's arithmetic is numpy's, which warns of what the kernels select out.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
FORMS = forms_of(sparse.sparse_rows)
OP = FORMS.grad
SHAPES = [(280, 280), (270, 262), (257, 300)]
ALL_SHAPED = [*shaped.DIVERGENCES, *shaped.OTHERS]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    small = ((1 << 31, launch.TileConfig(256, 4, 1)),)
    monkeypatch.setattr(launch, "TILE_CONFIGS", dict.fromkeys(launch.TILE_CONFIGS, small))
    # Loops over the entries turn, too.
    monkeypatch.setattr(sparse, "ENTRIES", 16)


def to_device(x):
    """A teacher, labels or a tensor."""
    if isinstance(x, torch.Tensor):
        return x.to(DEVICE)
    return type(x)(*map(to_device, x)) if isinstance(x, tuple) else x


def run_on_device(*case):
    return run(*map(to_device, case), OP)


def check_on_device(oracle, *case):
    check(oracle, *map(to_device, case), OP)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("number", range(3))
def test_matches_oracle(tail, number):
    columns, vocab = SHAPES[number]
    teacher = plain.make_teacher(6, min(columns, vocab), tail=tail)._replace(vocab=vocab)
    coef = plain.coefficients(6, torch.float32, (1.0, 2.0, 3.3)[number])
    labels = Targets(torch.randint(0, columns, (6,)), None, 0.1 * (number % 2))
    check_on_device(plain.oracle, torch.randn(6, columns) * 3, teacher, coef, labels)


@pytest.mark.parametrize("number", range(len(ALL_SHAPED)), ids=[str(d) for d in ALL_SHAPED])
def test_tails_with_prototypes_match_the_oracle(number):
    columns, vocab = SHAPES[number % 3]
    table = shaped.make_table(vocab, (torch.bfloat16, torch.float32)[number % 2])
    teacher = shaped.make_teacher(columns, vocab, ALL_SHAPED[number], table=table)
    labels = Targets(torch.randint(0, min(columns, vocab), (shaped.ROWS,)), None, 0.1 * (number % 2))
    coef = shaped.coefficients(torch.float32, (2.0, 1.0, 3.3)[number % 3])
    check_on_device(plain.oracle, torch.randn(shaped.ROWS, columns) * 3, teacher, coef, labels)


@pytest.mark.parametrize("gap", [-200.0, 200.0])
def test_heads_far_from_the_tail(gap):
    student = torch.randn(6, 300)
    ids = torch.stack([torch.randperm(300)[:4] for _ in range(6)])
    student.scatter_(1, ids, gap)
    teacher = plain.make_teacher(6, 300, counts=[4] * 6, ids=ids.reshape(-1).int())
    coef = plain.coefficients(6, torch.float32, 2.0)
    check_on_device(plain.oracle, student, teacher, coef, Targets(torch.randint(0, 300, (6,))))


@pytest.mark.parametrize("log_tail", [-70.0, -math.inf])
def test_tiny_tails_and_none(log_tail):
    teacher = plain.make_teacher(6, 300)._replace(tail=torch.full((6,), log_tail))
    coef = plain.coefficients(6, torch.float32, 2.0)
    check_on_device(plain.oracle, torch.randn(6, 300), teacher, coef, Targets(torch.arange(6)))


def test_masked_students():
    student, teacher = torch.randn(6, 300), plain.make_teacher(6, 300, counts=[3] * 6)
    student[:, 20:140] = -math.inf
    kept = torch.stack([torch.arange(i, i + 3) * 20 + 150 for i in range(6)])
    teacher = teacher._replace(ids=kept.reshape(-1).int())
    labels = Targets(torch.full((6,), 299), None, 0.1)
    check_on_device(plain.oracle, student, teacher, plain.coefficients(6, torch.float32, 2.0), labels)
    # Teacher mass on a masked column is an infinite divergence, and nobody's gradient at the mask.
    ids = (kept * 0 + torch.tensor([25, 30, 35])).reshape(-1).int()
    loss, grad, _ = run_on_device(student, teacher._replace(ids=ids), torch.ones(5, 6), Targets(torch.full((6,), 3)))
    assert (loss == math.inf).all()
    assert (grad[:, 20:140] == 0.0).all()


@pytest.mark.parametrize("tail", [True, False])
def test_padding_is_as_if_it_were_not_there(tail):
    student, teacher = torch.randn(6, 300), plain.make_teacher(6, 300, tail=tail, counts=[0, 1, 2, 5, 9, 3])
    label, coef = torch.randint(0, 300, (6,)), plain.coefficients(6, torch.float32, 2.0)
    label[3] = teacher.ids[5]  # an entry's
    padded = plain.with_padding(teacher, label, 300)
    clean, same = (run_on_device(student, x, coef, Targets(label, None, 0.1)) for x in (teacher, padded))
    for a, b in zip(clean, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", [*shaped.DIVERGENCES[:2], "dkd"], ids=str)
def test_padding_of_rows_with_prototypes_is_as_if_it_were_not_there(divergence):
    divergence = Divergence("dkd") if divergence == "dkd" else divergence
    student, teacher = torch.randn(3, 280), shaped.make_teacher(280, 300, divergence, counts=[2, 0, 5])
    label = torch.tensor([int(teacher.ids[0]), 5, 279])
    padded = plain.with_padding(teacher, label, 280)
    clean, same = (run_on_device(student, x, torch.ones(5, 3), Targets(label)) for x in (teacher, padded))
    for a, b in zip(clean, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", [None, *shaped.DIVERGENCES[:3]], ids=str)
def test_bad_ids_and_offsets_make_their_own_row_nan(divergence):
    for name, bad in (("ids", -1), ("ids", 300), ("ids", 2**31 - 1), ("offsets", 2**40)):
        counts = [2, 2, 2]
        if divergence is None:
            teacher = plain.make_teacher(3, 300, counts=counts)
        else:
            teacher = shaped.make_teacher(300, 310, divergence, counts=counts)
        getattr(teacher, name)[3 if name == "offsets" else 2] = bad
        row = 2 if name == "offsets" else 1
        labels = Targets(torch.zeros(3, dtype=torch.long))
        loss, grad, _ = run_on_device(torch.randn(3, 300), teacher, torch.ones(5, 3), labels)
        assert loss.isnan().nonzero()[:, 0].tolist() == [row]
        assert torch.equal(grad.isnan().all(1), loss.isnan())
        assert grad[~loss.isnan()].isfinite().all()


@pytest.mark.parametrize("where", ["student", "prototype", "prototype beyond", "tail", "weight", "index"])
def test_nan_reaches_its_row_only(where):
    table = shaped.make_table(310, torch.float32)
    teacher = shaped.make_teacher(300, 310, Divergence("forward_kl"), counts=[2, 2, 2], table=table)
    teacher.tail_prototypes.prototype_ids[:] = torch.tensor([0, 1, 2])
    student = torch.randn(3, 300)
    free = next(j for j in range(300) if j not in teacher.ids)
    targets = {
        "student": (student, (1, free), math.nan),
        "prototype": (table, (1, free), math.nan),
        "prototype beyond": (table, (1, 309), math.inf),
        "tail": (teacher.tail, 1, math.nan),
        "weight": (teacher.weights, 2, math.nan),
        "index": (teacher.tail_prototypes.prototype_ids, 1, 3),
    }
    tensor, index, value = targets[where]
    tensor[index] = value
    labels = Targets(torch.zeros(3, dtype=torch.long))
    loss, grad, _ = run_on_device(student, teacher, torch.ones(5, 3), labels)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("divergence", [None, Divergence("reverse_kl"), Divergence("dkd")], ids=str)
def test_the_gradient_may_take_the_students_place(divergence):
    if divergence is None:
        teacher = plain.make_teacher(6, 300)
    else:
        teacher = shaped.make_teacher(300, 300, divergence, counts=[0, 300, 1, 299, 5, 9])
    student, teacher = torch.randn(6, 300, device=DEVICE), to_device(teacher)
    coef = to_device(plain.coefficients(6, torch.float32, 2.0))
    targets = Targets(torch.randint(0, 300, (6,), device=DEVICE), None, 0.1)
    arguments = teacher.arguments(coef, targets)
    expected_loss, expected, no_parts = OP(student[None], *arguments)
    assert no_parts.shape == (4, 0)
    assert torch.equal(sparse.sparse_rows(student[None], None, *arguments)[0], expected_loss)
    assert torch.equal(FORMS.inplace(student[None], *arguments)[0], expected_loss)
    assert torch.equal(student, expected[0])


def test_a_tail_without_a_prototype_serves_forward_divergences_only():
    arguments = plain.make_teacher(6, 300).arguments(torch.ones(5, 6), Targets())._replace(kind=2)
    with pytest.raises(ValueError, match="divergence reverse_kl needs prototypes of the tails"):
        OP(torch.randn(1, 6, 300), *arguments)


# What the kernel reads rightly: other dtypes, strides of coef, prototypes without tails, and values of offsets.
HARMLESS = {"coef in halves", "coef transposed", "no tails", "a negative divergence"}


@pytest.mark.parametrize(
    "case", [x for x in hostile.SPARSE if not ("integers" in x or "offsets that" in x or x in HARMLESS)]
)
def test_tensors_that_are_not_what_it_reads_are_named(case):
    with pytest.raises((ValueError, IndexError)):
        FORMS.losses(hostile.STUDENT, *hostile.sparse(**hostile.SPARSE[case]))
