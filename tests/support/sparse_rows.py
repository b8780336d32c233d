"""Random sparse teachers and coefficients for the sparse row op, and its oracle."""

import torch

from kdfast.divergences import Divergence
from kdfast.loss import ops, reference
from kdfast.testing import assert_close_to_eager


def make_teacher(rows, vocab, *, tail=True, counts=None, ids=None):
    """Ragged, unsorted entries; a distribution with a tail, or unnormalised weights without."""
    # At least one column outside: a tail without any is an infinite divergence.
    counts = torch.randint(0, min(vocab, 40), (rows,)) if counts is None else torch.tensor(counts)
    if ids is None:
        ids = torch.cat([torch.randperm(vocab)[: int(c)] for c in counts]).int()
    weights = torch.rand(len(ids)) / 20
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    log_tail = torch.rand(rows).log() if tail else None
    divergence = Divergence("forward_kl" if tail else "soft_ce")
    return ops.SparseTeacher(ids, weights, offsets, log_tail, vocab, divergence)


def coefficients(rows, dtype, tau):
    coef = torch.rand(5, rows, dtype=torch.float64) + 0.2
    coef[0] = tau
    coef[4] *= 0.1
    coef[2, 1] = coef[3, 2] = coef[4, 3] = 0.0
    coef[2:, 4] = 0.0
    return coef.to(dtype)


def oracle(student, teacher, coef, labels):
    leaf = student.detach().clone().requires_grad_()
    loss, parts = reference.sparse_rows(leaf, **teacher._asdict(), coef=coef, targets=labels)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), grad, parts


def with_padding(teacher, label, columns):
    """The teacher with entries of weight 0 before, between and behind its own.

    Their ids are the entries' own, the label's, another one's, and some that are no column's.
    """
    counts, rows = teacher.offsets.diff().tolist(), []
    for ids, weights, y in zip(teacher.ids.split(counts), teacher.weights.split(counts), label.tolist(), strict=True):
        no_column = [-1, columns, 2**31 - 1, -(2**31)]
        pad = torch.cat([ids.flip(0), torch.tensor([y, 0, columns - 1, *no_column]), ids]).int()
        half, zeros = len(ids) // 2, torch.zeros(len(pad))
        rows.append(
            (
                torch.cat([pad, ids[:half], pad, ids[half:], pad]),
                torch.cat([zeros, weights[:half], zeros, weights[half:], zeros]),
            )
        )
    counts = torch.tensor([len(ids) for ids, _ in rows])
    ids, weights = map(torch.cat, zip(*rows, strict=True))
    return teacher._replace(ids=ids, weights=weights, offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def run(student, teacher, coef, labels, op=torch.ops.kdfast.sparse_rows_grad):
    teacher = teacher._replace(tail=None if teacher.tail is None else teacher.tail.to(coef.dtype))
    loss, grad, parts = op(student[None], *teacher.arguments(coef, labels, True))
    return loss, grad[0], parts


def check(oracle, student, teacher, coef, labels, op=torch.ops.kdfast.sparse_rows_grad):
    dtype = student.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    loss, grad, parts = run(student, teacher, coef, labels, op)
    eager_loss, eager_grad, eager_parts = oracle(student, teacher, coef, labels)
    exact_loss, exact_grad, exact_parts = oracle(student.double(), teacher, coef.double(), labels)
    assert_close_to_eager("gradient", grad, eager_grad, exact_grad, dtype)
    assert_close_to_eager("loss", loss, eager_loss, exact_loss, wide, floor=1.0)
    for name, part, eager, exact in zip(exact_parts._fields, parts, eager_parts, exact_parts, strict=True):
        assert_close_to_eager(name, part, eager, exact, wide, floor=1.0)
