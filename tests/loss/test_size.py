"""More elements than a 32-bit index holds: 4.3 GB of logits, minutes on small machines, so `make full` runs it."""

import pytest
import torch

from kdfast import kd_loss
from kdfast.divergences import Divergence
from kdfast.loss import ops
from kdfast.loss.reference import Targets

ROWS, COLUMNS = 66000, 32769


@pytest.mark.full
def test_more_than_2_to_the_31_elements():
    assert ROWS * COLUMNS > 2**31
    student = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    teacher = torch.randn(1, COLUMNS).bfloat16().expand(ROWS, COLUMNS)
    student[:] = torch.randn(COLUMNS).bfloat16()
    student[-3:] = torch.randn(3, COLUMNS).bfloat16()
    labels = torch.arange(ROWS) % COLUMNS
    last = student[-3:].clone().requires_grad_()
    expected = kd_loss(last, teacher[-3:], labels[-3:], temperature=2.0, ce_weight=1.0, num_items=ROWS)
    expected.backward()
    rows = kd_loss(student, teacher, labels, temperature=2.0, ce_weight=1.0, reduction="none")
    assert torch.allclose(rows[-3:].sum() / ROWS, expected.detach(), rtol=1e-5)
    # Over the logits themselves, which need not require grad for the op: no second tensor of this size.
    coef = torch.tensor([[2.0], [2.0], [4.0 / ROWS], [1.0 / ROWS], [0.0]]).repeat(1, ROWS)
    arguments = ops.DenseTeacher(teacher[None], Divergence("forward_kl")).arguments(coef, Targets(labels))
    torch.ops.kdfast.dense_rows_inplace(student[None], *arguments)
    assert torch.equal(student[-3:], last.grad)
