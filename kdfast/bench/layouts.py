"""How other systems store a teacher's row: bytes, and the label that training then sees.

Pure functions of one row of teacher probabilities, so that a benchmark can set gradient noise, bias and KL against
bytes. Bytes are those of the labels themselves: no containers, no tokens, no compression by the file system.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["LAYOUTS", "Label", "Layout", "bytes_per_token"]


@dataclass(frozen=True)
class Label:
    """The label of one row, as training sees it.

    ``rest`` is the probability that the entries leave. If it is ``spread``, every other column has an equal share of
    it; else it is one more class of which only the mass counts. Systems that renormalise leave 0.
    """

    ids: Tensor  # (entries,) int64
    weights: Tensor  # (entries,) float64
    rest: float = 0.0
    spread: bool = False

    def dense(self, vocab_size: int) -> Tensor:
        """(vocab_size,) float64 probabilities. A rest that is not spread is left out: the sum is then 1 - rest."""
        others = vocab_size - len(self.ids)
        share = self.rest / others if self.spread and others else 0.0
        return torch.full((vocab_size,), share, dtype=torch.float64).scatter(0, self.ids, self.weights)


@dataclass(frozen=True)
class Layout:
    """How a system stores a row.

    Attributes:
        nbytes: bytes of a row by (vocabulary, entries).
        label: the label by (p, entries, generator), p being (vocab,) probabilities. Draws use ``generator``.
        entries: the published number of entries; for draws, how many are drawn.
        fixed: it is that number or none: the layout has no other.
    """

    nbytes: Callable[[int, float], float]
    label: Callable[[Tensor, int, Generator | None], Label]
    entries: int
    fixed: bool = False


def bytes_per_token(name: str, vocab_size: int, entries: float | None = None) -> float:
    """Bytes of one row in the layout ``name``.

    Args:
        name: a key of ``LAYOUTS``.
        vocab_size: columns.
        entries: entries stored per row: k, or for ``rskd`` the mean number of *unique* ids among the draws. Default:
            the published k; ``rskd`` has none.

    Raises:
        ValueError: an unknown layout, or a number of entries that it does not have.
    """
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {sorted(LAYOUTS)}, got {name!r}")
    layout = LAYOUTS[name]
    if entries is None:
        if name == "rskd":
            raise ValueError("rskd stores as many entries as its draws have unique ids: give their mean")
        entries = layout.entries
    if not 0 < entries <= vocab_size:
        raise ValueError(f"entries must lie in (0, {vocab_size}], got {entries}")
    if layout.fixed and entries != layout.entries:
        raise ValueError(f"{name} has {layout.entries} entries, got {entries}")
    return layout.nbytes(vocab_size, entries)


def topk_renormalised(p: Tensor, k: int, generator: Generator | None = None) -> Label:
    """The k largest, scaled up to add up to 1: axolotl, and MaxText's cut."""
    top, ids = p.double().topk(k)
    return Label(ids, top / top.sum())


# ---- DistillKit ---------------------------------------------------------------------------------------------------


def distillkit_bytes(vocab_size: int, k: float, exact_k: int, exact_bytes: int, terms: int) -> float:
    """``exact_k`` values, 4 bytes per coefficient, ids of ceil(log2 V) bits packed into bytes.

    Source: github.com/arcee-ai/DistillKit, ``distillkit/compression/config.py`` (``total_bits``) at 897bd13.
    """
    return exact_k * exact_bytes + terms * 4 + math.ceil(k * math.ceil(math.log2(vocab_size)) / 8)


def distillkit_label(p: Tensor, k: int, exact_k: int, powers: tuple[float, ...]) -> Label:
    """The first ``exact_k`` log-probabilities in bfloat16, the rest a least-squares fit of powers of their rank.

    Renormalised, as ``missing_probability_handling: zero`` (the default) trains on them. Source: the same repository,
    ``compression/monotonic_logprobs.py`` for the fit, which is in single precision there and in double here, to its
    advantage, and ``lossfuncs/common.py`` for the rest.
    """
    top, ids = p.double().log().topk(k)
    exact, approximated = top[:exact_k].bfloat16().double(), top[exact_k:]
    rank = torch.arange(len(approximated), dtype=torch.float64)
    basis = torch.stack([rank**power for power in powers], 1)
    coefficients = (torch.linalg.pinv(basis) @ approximated).float().double()
    return Label(ids, torch.cat([exact, basis @ coefficients]).softmax(0))


RECOMMENDED, BUDGET = (0, 1, 2, 3, 4, 0.5), (0, 1, 0.5)


# ---- Megatron-Core ------------------------------------------------------------------------------------------------


def megatron_label(p: Tensor, k: int, generator: Generator | None = None) -> Label:
    """Log-probabilities in float16 and a ghost token for the rest.

    Source: github.com/NVIDIA/Megatron-LM, ``megatron/training/distillation/logits_saver.py`` (fp16 is its default) and
    ``cached_logits_loss.py``.
    """
    top, ids = p.double().log().topk(k)
    weights = top.half().double().exp()
    return Label(ids, weights, max(0.0, 1.0 - float(weights.sum())))


# ---- sampling -----------------------------------------------------------------------------------------------------


def rskd_label(p: Tensor, draws: int, generator: Generator | None = None) -> Label:
    """The frequencies of ids in ``draws`` draws with replacement, which are unbiased.

    Source: Sparse Logit Sampling (RS-KD), arXiv 2503.16870. Published: 17 bits of id and 7 of count, 3 bytes an entry.
    """
    drawn = torch.multinomial(p.double(), draws, replacement=True, generator=generator)
    counts = drawn.bincount()
    ids = counts.nonzero().flatten()
    return Label(ids, counts[ids].double() / draws)


def sampledkd_label(p: Tensor, keep: int, generator: Generator | None = None) -> Label:
    """The ``keep`` most frequent of 50 draws, frequencies in 7 bits, renormalised: the cut brings the bias back.

    Source: the re-implementation SampledKD as read for research: round(127 * count / 50), 12 entries of 3 bytes in 36
    bytes, and one for their number.
    """
    full = rskd_label(p, 50, generator)
    weights, places = full.weights.topk(min(keep, len(full.ids)))
    levels = (weights * 127).round()
    return Label(full.ids[places], levels / levels.sum())


# ---- classification -----------------------------------------------------------------------------------------------


def tinyvit_label(p: Tensor, k: int, generator: Generator | None = None) -> Label:
    """Probabilities in float16, the rest spread evenly.

    Source: github.com/microsoft/Cream, ``TinyViT/main.py`` at 00dbc84. Stored: int16 ids, float16 values, and the
    4-byte seed of the augmentation.
    """
    top, ids = p.double().topk(k)
    weights = top.half().double()
    return Label(ids, weights, 1.0 - float(weights.sum()), spread=True)


def fkd_label(p: Tensor, k: int, generator: Generator | None = None) -> Label:
    """``marginal_smoothing_k5``: probabilities in float32, the rest spread evenly.

    Source: FKD's ``utils_FKD.py`` (``Recover_soft_label``). Stored per crop: ids and values as float32, four float32
    coordinates, a flip.
    """
    top, ids = p.double().topk(k)
    weights = top.float().double()
    return Label(ids, weights, 1.0 - float(weights.sum()), spread=True)


LAYOUTS: dict[str, Layout] = {
    "distillkit-recommended": Layout(
        lambda vocab, k: distillkit_bytes(vocab, k, exact_k=16, exact_bytes=2, terms=6),
        lambda p, k, generator: distillkit_label(p, k, 16, RECOMMENDED),
        entries=128,
        fixed=True,
    ),
    "distillkit-budget": Layout(
        lambda vocab, k: distillkit_bytes(vocab, k, exact_k=1, exact_bytes=2, terms=3),
        lambda p, k, generator: distillkit_label(p, k, 1, BUDGET),
        entries=50,
        fixed=True,
    ),
    # A uint16, a bool for the 17th bit, and a float16 each.
    "megatron": Layout(lambda vocab, k: 5 * k, megatron_label, entries=64),
    # int32 and float32. Source: MaxText's ArrayRecord of pickled batches (PR 3193), top-k logits.
    "maxtext": Layout(lambda vocab, k: 8 * k, topk_renormalised, entries=64),
    "rskd": Layout(lambda vocab, unique: 3 * unique, rskd_label, entries=50),
    "sampledkd": Layout(lambda vocab, k: 3 * k + 1, sampledkd_label, entries=12, fixed=True),
    "tinyvit": Layout(lambda vocab, k: 4 * k + 4, tinyvit_label, entries=100),
    "fkd": Layout(lambda vocab, k: 8 * k + 17, fkd_label, entries=5),
}
