"""The row ops called directly, with tensors that are not what they read: an error, and no memory outside of them."""

import pytest
import torch

from kdfast._calls import DenseCall, SparseCall
from kdfast.divergences import Divergence
from kdfast.loss.ops import DenseTeacher, SparseTeacher
from kdfast.loss.reference import TailPrototypes, Targets

ROWS, COLUMNS = 6, 40
STUDENT = torch.zeros(2, 3, COLUMNS)
OFFSETS = torch.arange(ROWS + 1) * 2


def dense(**changed) -> DenseCall:
    teacher = DenseTeacher(torch.randn(2, 3, COLUMNS), Divergence("forward_kl"))
    targets = Targets(torch.zeros(ROWS, dtype=torch.long), torch.rand(2, 3, COLUMNS))
    return teacher.arguments(torch.ones(5, ROWS), targets)._replace(**changed)


def sparse(**changed) -> SparseCall:
    prototypes = TailPrototypes(torch.zeros(ROWS, dtype=torch.long), torch.rand(3, COLUMNS))
    ids, weights = torch.arange(2 * ROWS).int(), torch.rand(2 * ROWS)
    teacher = SparseTeacher(ids, weights, OFFSETS, torch.zeros(ROWS), COLUMNS, Divergence("jsd"), prototypes)
    targets = Targets(torch.zeros(ROWS, dtype=torch.long), torch.rand(2, 3, COLUMNS))
    return teacher.arguments(torch.ones(5, ROWS), targets)._replace(**changed)


def offsets(*values):
    return torch.tensor([*values, *[12] * (ROWS + 1 - len(values))])


BOTH = {
    "coef of fewer rows": {"coef": torch.ones(5, ROWS - 1)},
    "coef of fewer numbers": {"coef": torch.ones(4, ROWS)},
    "coef in halves": {"coef": torch.ones(5, ROWS).half()},
    "coef transposed": {"coef": torch.ones(ROWS, 5).t()},
    "fewer labels": {"label": torch.zeros(ROWS - 1, dtype=torch.long)},
    "labels of 32 bits": {"label": torch.zeros(ROWS, dtype=torch.int32)},
    "label_probs of fewer rows": {"label_probs": torch.rand(1, 3, COLUMNS)},
    "label_probs of fewer columns": {"label_probs": torch.rand(2, 3, COLUMNS - 1)},
    "label_probs that are integers": {"label_probs": torch.zeros(2, 3, COLUMNS, dtype=torch.long)},
    "label_probs transposed": {"label_probs": torch.rand(2, COLUMNS, 3).transpose(1, 2)},
    "no such divergence": {"kind": 99},
    "a negative divergence": {"kind": -1},
}
DENSE = {
    **BOTH,
    "a teacher of fewer rows": {"teacher": torch.randn(1, 3, COLUMNS)},
    "a teacher without rows": {"teacher": torch.randn(2, 0, COLUMNS)},
    "a flat teacher": {"teacher": torch.randn(ROWS, COLUMNS)},
    "a teacher of integers": {"teacher": torch.zeros(2, 3, COLUMNS, dtype=torch.int32)},
    "a transposed teacher": {"teacher": torch.randn(2, COLUMNS, 3).transpose(1, 2)},
}
SPARSE = {
    **BOTH,
    "offsets that go back": {"offsets": offsets(0, 100, 6)},
    "offsets that begin before": {"offsets": offsets(-4)},
    "offsets that end behind": {"offsets": OFFSETS + 1},
    "fewer offsets": {"offsets": OFFSETS[:-1]},
    "offsets of 32 bits": {"offsets": OFFSETS.int()},
    "fewer weights": {"weights": torch.rand(2 * ROWS - 1)},
    "weights of 64 bits": {"weights": torch.rand(2 * ROWS).double()},
    "ids of 64 bits": {"ids": torch.arange(2 * ROWS)},
    "strided ids": {"ids": torch.arange(4 * ROWS).int()[::2]},
    "fewer tails": {"tail": torch.zeros(ROWS - 1)},
    "tails in halves": {"tail": torch.zeros(ROWS).half()},
    "no tails": {"tail": None},
    "fewer prototype ids": {"prototype_ids": torch.zeros(ROWS - 1, dtype=torch.long)},
    "no prototype ids": {"prototype_ids": None},
    "prototypes of fewer columns": {"prototypes": torch.rand(3, COLUMNS - 1)},
    "transposed prototypes": {"prototypes": torch.rand(COLUMNS, 3).t()},
    "prototypes that are integers": {"prototypes": torch.zeros(3, COLUMNS, dtype=torch.long)},
    "a negative vocabulary": {"vocab": -1, "prototypes": None, "prototype_ids": None, "kind": 0},
    "a divergence without prototypes": {"prototypes": None, "prototype_ids": None},
}
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
        lambda: ops.select_sample(logits, 1.0, 3, 0, 0),
    ):
        with pytest.raises((RuntimeError, IndexError)):
            call()
