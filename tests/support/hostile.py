"""Calls of the row ops with tensors that are not what they read: shorter, of another dtype, laid out another way."""

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
