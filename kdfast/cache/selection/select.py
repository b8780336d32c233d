"""Unbiased samplers of a row's columns, whose weights have its softmax as expectation; and ``top``, the likeliest.

Kernels for CPUs and, with Triton, for GPUs work straight from the logits without sorting a row; on a CPU they take a
fraction of the time of PyTorch's log-sum-exp. Everything else falls back to a PyTorch implementation of the same
sampler: other devices, float64 on a GPU, and arguments that no kernel takes. The two differ in entries where their sums
round differently.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kdfast._C  # noqa: F401  (registers the ops)
from kdfast._triton import kernel
from kdfast.models import check_logits

__all__ = [
    "GOLDEN",
    "Drawn",
    "Thresholded",
    "Top",
    "missing",
    "record_seed",
    "sample",
    "splitmix64",
    "threshold",
    "top",
    "uniforms",
]


class Thresholded(NamedTuple):
    """The entries that ``threshold`` keeps of each row, concatenated."""

    ids: Tensor  # (nnz,) int32, ascending within a row
    probs: Tensor  # (nnz,) float32: the probability itself above tau, tau below
    counts: Tensor  # (rows,) int32: entries of each row
    lse: Tensor  # (rows,) float32: log-sum-exp of logits / temperature


class Drawn(NamedTuple):
    """The entries that ``sample`` draws of each row, concatenated."""

    ids: Tensor  # (nnz,) int32, ascending within a row
    draws: Tensor  # (nnz,) int32: how often each was drawn; they sum to the row's draws
    counts: Tensor  # (rows,) int32: entries of each row
    lse: Tensor  # (rows,) float32: log-sum-exp of logits / temperature


class Top(NamedTuple):
    """The k likeliest columns of each row, and the probability of all others."""

    ids: Tensor  # (rows, k) int32, the likeliest first; of equal ones, on a CPU, the smaller id; 0 for the missing
    probs: Tensor  # (rows, k) float64; 0 where a row has fewer columns that are not masked, or where it underflows
    rest: Tensor  # (rows,) float64: the probability of all other columns
    lse: Tensor  # (rows,) float32: log-sum-exp of logits / temperature


def threshold(logits: Tensor, *, temperature: float, tau: float, seed: int, first_row: int = 0) -> Thresholded:
    """Keep every probability p above tau as it is, and each one below with probability p / tau, at the value tau.

    The columns below are chosen by systematic sampling: one uniform offset per row, and a column is kept where the
    cumulative sum of those before it and itself crosses a multiple of tau beyond the offset. A row has at most
    ceil(1 / tau) + 1 entries.

    Args:
        logits: (rows, vocabulary), any float dtype. Without NaN and +inf; each row with a finite column.
        temperature: the softmax's.
        tau: in (0, 1].
        seed: 64 bits, signed; ``record_seed`` makes one.
        first_row: the number of the first row: a row's offset depends on ``seed`` and its number alone.

    Raises:
        TypeError: logits that are no float tensor.
        ValueError: an argument outside its range.
    """
    _check_logits(logits, temperature)
    if not 0.0 < tau <= 1.0:
        raise ValueError(f"tau must lie in (0, 1], got {tau}")
    out = torch.ops.kdfast.select_threshold(
        _rows(logits), float(temperature), float(tau), _int64("seed", seed), _row(first_row)
    )
    return Thresholded(*out)


def sample(
    logits: Tensor, *, temperature: float, draws: int, systematic: bool = False, seed: int, first_row: int = 0
) -> Drawn:
    """Draw columns with replacement from each row's softmax.

    Args:
        logits: (rows, vocabulary), any float dtype. Without NaN and +inf; each row with a finite column.
        temperature: the softmax's.
        draws: how many for each row, at least 1.
        systematic: whether a row's draws lie at equal distances along its cumulative probabilities, moved by one
            uniform offset, instead of each for itself. A column of probability p is then drawn ``draws * p`` times,
            rounded up or down, with the same expectation.
        seed: 64 bits, signed; ``record_seed`` makes one.
        first_row: the number of the first row: a row's draws depend on ``seed`` and its number alone.

    Raises:
        TypeError: logits that are no float tensor.
        ValueError: an argument outside its range.
    """
    _check_logits(logits, temperature)
    if not 1 <= index(draws) < 2**31:
        raise ValueError(f"draws must lie in [1, 2**31), got {draws}")
    out = torch.ops.kdfast.select_sample(
        _rows(logits), float(temperature), index(draws), bool(systematic), _int64("seed", seed), _row(first_row)
    )
    return Drawn(*out)


def top(logits: Tensor, *, temperature: float, k: int) -> Top:
    """The k likeliest columns, ``(logits / temperature).softmax(1).topk(k)``, and the probability of all others.

    Args:
        logits: (rows, vocabulary), any float dtype. Without NaN and +inf; each row with a finite column.
        temperature: the softmax's.
        k: from 0 to the vocabulary's size.

    Raises:
        TypeError: logits that are no float tensor.
        ValueError: an argument outside its range.
    """
    _check_logits(logits, temperature)
    if not 0 <= index(k) <= logits.shape[1]:
        raise ValueError(f"k must lie in [0, {logits.shape[1]}], got {k}")
    return Top(*torch.ops.kdfast.select_top(_rows(logits), float(temperature), index(k)))


def missing(logits: Tensor, likeliest: Top) -> Tensor:
    """(rows, k) bool: which of ``top``'s columns are none, for their rows have fewer that are not masked."""
    none = likeliest.probs == 0.0
    rows = none.any(1).nonzero()[:, 0]
    if rows.numel():  # columns whose probability underflows are columns still
        finite = (logits[rows] > -torch.inf).sum(1, keepdim=True)
        none[rows] = torch.arange(none.shape[1], device=none.device) >= finite
    return none


def record_seed(seed: int, key: bytes) -> int:
    """The samplers' seed for one record: BLAKE2b-64 of the user's seed and the record's key, as a signed integer."""
    digest = blake2b(_int64("seed", seed).to_bytes(8, "little", signed=True) + key, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# ---- randomness -----------------------------------------------------------------------------------------------------

GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment


def uniforms(seed: int, first_row: int, rows: int, count: int = 1) -> NDArray[np.float64]:
    """(rows, count) uniform numbers in (0, 1), a function of ``seed`` and each row's number alone (splitmix64).

    ``threshold`` and systematic draws take a row's first one as their offset; ``sample`` makes the spacings of
    independent draws from ``draws + 1``.
    """
    with np.errstate(over="ignore"):
        row = np.arange(first_row + 1, first_row + 1 + rows, dtype=np.uint64) * np.uint64(GOLDEN)
        stream = splitmix64(splitmix64(np.array([(seed + GOLDEN) % 2**64], np.uint64)) + row)
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
        bits = splitmix64(stream[:, None] + steps)
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64: every bit of the result depends on every bit of ``x``."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---- checks ---------------------------------------------------------------------------------------------------------


def _check_logits(logits: Tensor, temperature: float) -> None:
    check_logits("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be (rows, vocabulary), got shape {tuple(logits.shape)}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _rows(logits: Tensor) -> Tensor:
    """(1, rows, vocabulary) of unit stride along the vocabulary."""
    logits = logits.detach()
    return (logits if logits.shape[1] < 2 or logits.stride(1) == 1 else logits.contiguous())[None]


def _int64(name: str, value: int) -> int:
    if not -(2**63) <= index(value) < 2**63:
        raise ValueError(f"{name} must be a signed 64-bit integer, got {value}")
    return index(value)


def _row(first_row: int) -> int:
    if not 0 <= index(first_row) < 2**62:
        raise ValueError(f"first_row must lie in [0, 2**62), got {first_row}")
    return index(first_row)


# ---- elsewhere ------------------------------------------------------------------------------------------------------


def _probabilities(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(rows, vocabulary) probabilities in float64, and their (rows,) log-sum-exp."""
    scaled = logits.reshape(-1, logits.shape[-1]).double() / temperature
    lse = scaled.logsumexp(1)
    return (scaled - lse[:, None]).exp(), lse.float()


def _entries(kept: Tensor, values: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids = kept.nonzero()[:, 1].int()
    return ids, values[kept], kept.sum(1).int(), lse


def _threshold(
    logits: Tensor, temperature: float, tau: float, seed: int, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, lse = _probabilities(logits, temperature)
    offset = torch.from_numpy(uniforms(seed, first_row, len(p))).to(p.device)
    low = p.masked_fill(p > tau, 0.0)
    # How many points of the grid lie below the cumulative sum, behind each column and before it.
    behind = (low.cumsum(1) / tau - offset).ceil().clamp(min=0)
    hit = behind.diff(dim=1, prepend=torch.zeros_like(offset)) > 0
    return _entries(hit | (p > tau), p.clamp(min=tau).float(), lse)


def _positions(draws: int, systematic: bool, seed: int, first_row: int, rows: int) -> NDArray[np.float64]:
    """(rows, draws): where along a row's cumulative probabilities its draws lie, ascending in (0, 1)."""
    if systematic:
        return (np.arange(draws) + uniforms(seed, first_row, rows)) / draws
    sums = (-np.log(uniforms(seed, first_row, rows, draws + 1))).cumsum(1)
    return sums[:, :-1] / sums[:, -1:]


def _sample(
    logits: Tensor, temperature: float, draws: int, systematic: bool, seed: int, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, lse = _probabilities(logits, temperature)
    mass = p.cumsum(1)
    total = mass[:, -1:].contiguous()
    at = torch.from_numpy(_positions(draws, systematic, seed, first_row, len(p))).to(p.device) * total
    # A point that rounding has put on the row's end belongs to the last column with a probability.
    last = torch.searchsorted(mass, total, side="left")
    column = torch.minimum(torch.searchsorted(mass, at, side="right"), last)
    drawn = torch.zeros_like(p, dtype=torch.int32).scatter_add_(1, column, torch.ones_like(column, dtype=torch.int32))
    return _entries(drawn > 0, drawn, lse)


def _top(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, lse = _probabilities(logits, temperature)
    # By the logits, which have an order where probabilities underflow.
    best, ids = logits.reshape(-1, logits.shape[-1]).topk(k, dim=1)
    probs, rest = p.gather(1, ids), p.scatter(1, ids, 0.0).sum(1)
    return ids.masked_fill((best == -math.inf) | p.isnan().any(1)[:, None], 0).int(), probs, rest, lse


MOST_IN_KERNEL = 64  # columns of a row that its kernel sorts


def _threshold_on_gpu(
    logits: Tensor, temperature: float, tau: float, seed: int, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = kernel("select_threshold") if logits.dtype != torch.float64 else None
    if run is None:
        return _threshold(logits, temperature, tau, seed, first_row)
    return run(logits, temperature, tau, seed, first_row)


def _top_on_gpu(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = kernel("select_top") if 1 <= k <= MOST_IN_KERNEL and logits.dtype != torch.float64 else None
    return _top(logits, temperature, k) if run is None else run(logits, temperature, k)


def _fake_top(logits: Tensor, temperature: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0] * logits.shape[1]
    return (
        logits.new_empty((rows, k), dtype=torch.int32),
        logits.new_empty((rows, k), dtype=torch.float64),
        logits.new_empty(rows, dtype=torch.float64),
        logits.new_empty(rows, dtype=torch.float32),
    )


def _fake(logits: Tensor, values: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    rows = logits.shape[0] * logits.shape[1]
    return (
        logits.new_empty(entries, dtype=torch.int32),
        logits.new_empty(entries, dtype=values),
        logits.new_empty(rows, dtype=torch.int32),
        logits.new_empty(rows, dtype=torch.float32),
    )


for _name, _fallback, _values in (
    ("select_threshold", _threshold, torch.float32),
    ("select_sample", _sample, torch.int32),
):
    torch.library.impl(f"kdfast::{_name}", "default", _fallback)
    torch.library.register_fake(f"kdfast::{_name}", lambda logits, *_, values=_values: _fake(logits, values))
torch.library.impl("kdfast::select_top", "default", _top)
torch.library.impl("kdfast::select_threshold", "cuda", _threshold_on_gpu)
torch.library.impl("kdfast::select_top", "cuda", _top_on_gpu)
torch.library.register_fake("kdfast::select_top", _fake_top)
