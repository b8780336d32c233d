"""The sparse op beside an oracle of the same rows in eager PyTorch."""

import torch

from kdfast.testing import assert_close_to_eager


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
