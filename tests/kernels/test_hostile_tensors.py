"""The row ops called directly, with tensors that are not what they read: an error, and no memory outside of them."""

import pytest
import torch

from support.hostile import COLUMNS, DENSE, SPARSE, STUDENT, dense, sparse

FORMS = ("", "_grad", "_inplace")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", DENSE)
def test_dense(form, case):
    op = getattr(torch.ops.kdfast, f"dense_rows{form}")
    assert op(STUDENT.clone(), *dense())[0].isfinite().all()
    with pytest.raises(RuntimeError):
        op(STUDENT.clone(), *dense(**DENSE[case]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SPARSE)
def test_sparse(form, case):
    op = getattr(torch.ops.kdfast, f"sparse_rows{form}")
    assert op(STUDENT.clone(), *sparse())[0].isfinite().all()
    with pytest.raises(RuntimeError):
        op(STUDENT.clone(), *sparse(**SPARSE[case]))


@pytest.mark.parametrize(
    "student", [STUDENT[0], STUDENT.int(), STUDENT.transpose(1, 2)], ids=["flat", "int", "strided"]
)
@pytest.mark.parametrize("call", [dense, sparse])
def test_students(student, call):
    op = torch.ops.kdfast.dense_rows_grad if call is dense else torch.ops.kdfast.sparse_rows_grad
    with pytest.raises((RuntimeError, IndexError)):
        op(student, *call())


def test_more_entries_than_columns_make_a_row_nan():
    ids = torch.arange(60).int() % COLUMNS
    call = sparse(ids=ids, weights=torch.full((60,), 0.01), offsets=torch.tensor([0, 50, 51, 52, 53, 54, 60]))
    loss = torch.ops.kdfast.sparse_rows(STUDENT, *call)[0]
    assert loss.isnan().tolist() == [True, *[False] * 5]


@pytest.mark.parametrize("factor", [torch.ones(0), torch.ones(2), torch.ones((), dtype=torch.long)], ids=str)
def test_scale(factor):
    with pytest.raises(RuntimeError):
        torch.ops.kdfast.scale_(torch.ones(4), factor)


@pytest.mark.parametrize("logits", [torch.zeros(4, 8), torch.zeros(1, 4, 8).int(), torch.zeros(1, 8, 4).mT], ids=str)
def test_selection(logits):
    ops = torch.ops.kdfast
    for call in (
        lambda: ops.select_top(logits, 1.0, 2),
        lambda: ops.select_threshold(logits, 1.0, 0.1, 0, 0),
        lambda: ops.select_sample(logits, 1.0, 3, False, 0, 0),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            call()
