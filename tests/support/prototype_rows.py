"""Random teachers whose tails have prototypes, coefficients for the sparse row op, and its oracle."""

import torch

from kdfast import alpha_beta, jsd, skew_forward_kl, skew_reverse_kl
from kdfast.divergences import Divergence
from kdfast.loss import ops, reference

DIVERGENCES = [
    Divergence("forward_kl"),
    Divergence("soft_ce"),
    Divergence("reverse_kl"),
    Divergence("symmetric_kl"),
    jsd(0.5),
    jsd(0.1, normalize=True),
]
OTHERS = [skew_forward_kl(0.2), skew_reverse_kl(0.2), Divergence("tvd"), alpha_beta(0.4, 0.6), Divergence("dkd")]
OTHERS += [Divergence(name) for name in ("squared_hellinger", "pearson_chi2", "neyman_chi2")]
ROWS = 7


def make_table(vocab, dtype=torch.bfloat16, count=3):
    """Prototypes over many orders of magnitude, whose rows do not sum to 1."""
    return (torch.randn(count, vocab) * 2).exp().div(vocab).to(dtype)


def make_teacher(columns, vocab, divergence, counts=None, table=None):
    """Rows of no entry, of every column, and of some, unsorted; every other row has its own tail and shape."""
    shared = min(columns, vocab)
    counts = (
        [0, shared, 1, shared - 1, *torch.randint(0, min(shared, 40) + 1, (ROWS - 4,))] if counts is None else counts
    )
    counts = torch.tensor([int(count) for count in counts])
    ids = torch.cat([torch.randperm(shared)[: int(count)] for count in counts]).int()
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    weights = torch.rand(len(ids)) / counts.repeat_interleave(counts) + 1e-4
    table = make_table(vocab) if table is None else table
    tail_prototypes = reference.TailPrototypes(torch.randint(0, len(table), (len(counts),)), table)
    return ops.SparseTeacher(ids, weights, offsets, torch.rand(len(counts)).log(), vocab, divergence, tail_prototypes)


def coefficients(dtype, tau, rows=ROWS):
    coef = torch.rand(5, rows, dtype=torch.float64) + 0.2
    coef[0] = tau
    # Whatever stands there: the labels hold at their temperature as they are.
    coef[1] = 7.0
    coef[4] *= 0.1
    if rows == ROWS:
        coef[2, 1] = coef[3, 2] = coef[4, 3] = 0.0
        coef[2:, 4] = 0.0
    return coef.to(dtype)
