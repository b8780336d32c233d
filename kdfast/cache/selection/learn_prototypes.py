"""``learn_prototypes``: typical tails of a teacher's distributions, by k-means in the geometry of forward KL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import inf

import torch
from torch import Tensor

from kdfast.cache.selection.prototypes import PrototypeTable

__all__ = ["learn_prototypes"]

FEATURES = 64  # dimensions of the random projection that the first clusters are found in
ROWS = 512  # at a time
ROWS_PER_SHAPE = 32  # fewer tell little of a tail
BACKGROUND = (
    1e-3  # how much of the mean over all prototypes each prototype takes in: no column stays without probability
)


def learn_prototypes(
    batches: Callable[[], Iterable[Tensor]],
    *,
    count: int = 256,
    entries: int = 3,
    temperature: float = 1.0,
    rounds: int = 2,
    seed: int = 0,
) -> PrototypeTable:
    """Cluster the tails of a teacher's distributions into the table that ``codec="prototype"`` takes.

    Rows are first clustered by a random projection of their centred log-probabilities. Then each round assigns rows
    to the prototype that represents them best in forward KL, and makes each prototype the mean of its rows: the
    k-means of that divergence (Banerjee et al., 2005, "Clustering with Bregman divergences").

    Args:
        batches: called ``rounds + 2`` times, gives the same (rows, vocab) logits each time: some ten thousand rows.
        count: how many prototypes, at most one for each 32 rows.
        entries: how many columns of each row a label will hold exactly; they take no part in the prototypes.
        temperature: the teacher's.
        rounds: of assignment by forward KL.

    Raises:
        ValueError: there is no row, or no prototype is wanted; or a row holds NaN or +inf or no finite value, or the
            temperature is not positive and finite.
    """
    if not 0 < temperature < inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    features = [_features(p, seed) for p in _distributions(batches, temperature)]
    rows = sum(map(len, features))
    if count < 1:
        raise ValueError(f"there must be a prototype at least, got count={count}")
    if not rows:
        raise ValueError("prototypes are learned from rows, and there is none: no batch, or a mask without a True")
    count = min(count, max(1, rows // ROWS_PER_SHAPE))
    groups = _kmeans(torch.cat(features), count, seed)
    prototypes = _means(batches, temperature, entries, count, groups)
    for _ in range(rounds):
        prototypes = _means(batches, temperature, entries, count, prototypes)
    return prototypes


def _distributions(batches: Callable[[], Iterable[Tensor]], temperature: float) -> Iterator[Tensor]:
    for batch in batches():
        # The maximum is NaN or +inf if any column is, and -inf if no column is finite.
        if not bool(batch.amax(1).isfinite().all()):
            raise ValueError("prototypes cannot be learned of rows that hold NaN or +inf, or no finite value")
        for logits in torch.split(batch, ROWS):
            yield (logits.float() / temperature).softmax(1)


def _features(probs: Tensor, seed: int) -> Tensor:
    """(rows, FEATURES): projected, centred log-probabilities, each row weighted as its columns matter on average."""
    logs = probs.clamp(min=1e-9).log()
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(probs.shape[1], FEATURES, generator=generator).to(probs.device)
    return (logs - logs.mean(1, keepdim=True)) @ projection / probs.shape[1] ** 0.5


def _kmeans(x: Tensor, count: int, seed: int, iterations: int = 10) -> Tensor:
    """(rows,) the cluster of each row, by Lloyd's algorithm from centres far apart."""
    centres = _spread(x, count, seed)
    groups = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for _ in range(iterations):
        groups = torch.cat([torch.cdist(part, centres).argmin(1) for part in torch.split(x, 4096)])
        sums = torch.zeros_like(centres).index_add_(0, groups, x)
        sizes = torch.bincount(groups, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return groups


def _spread(x: Tensor, count: int, seed: int) -> Tensor:
    """k-means++ seeding: each centre is a row drawn by its squared distance from the nearest centre so far."""
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(x), (), generator=generator))
    centres, nearest = [x[first]], (x - x[first]).square().sum(1)
    for _ in range(count - 1):
        reach = nearest.double().cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64).item() * reach[-1]
        row = x[int(torch.searchsorted(reach, drawn).clamp(max=len(x) - 1))]
        centres.append(row)
        nearest = torch.minimum(nearest, (x - row).square().sum(1))
    return torch.stack(centres)


def _means(
    batches: Callable[[], Iterable[Tensor]],
    temperature: float,
    entries: int,
    count: int,
    groups: Tensor | PrototypeTable,
) -> PrototypeTable:
    """The mean tail and the mean distribution of each group's rows, the largest group first.

    ``groups`` are the rows' groups, or prototypes that tell each row's.
    """
    tails = means = sizes = torch.empty(0)
    start = 0
    for probs in _distributions(batches, temperature):
        if not start:
            tails, means = probs.new_zeros(count, probs.shape[1]), probs.new_zeros(count, probs.shape[1])
            sizes = probs.new_zeros(count)
        ids = probs.topk(min(entries, probs.shape[1]), dim=1).indices
        group = groups.assign(probs, ids) if isinstance(groups, PrototypeTable) else groups[start : start + len(probs)]
        means.index_add_(0, group, probs)
        tails.index_add_(0, group, probs.scatter(1, ids, 0.0))
        sizes.index_add_(0, group, torch.ones_like(group, dtype=sizes.dtype))
        start += len(probs)
    by_size = sizes.argsort(descending=True, stable=True)
    return PrototypeTable.of(_smooth(tails[by_size]), _smooth(means[by_size]))


def _smooth(sums: Tensor) -> Tensor:
    """Rows that sum to 1, each with a little of the mean over all, so that an unlucky group is a distribution too."""
    overall = sums.sum(0) / sums.sum().clamp(min=1e-30)
    rows = sums / sums.sum(1, keepdim=True).clamp(min=1e-30)
    return (1 - BACKGROUND) * rows + BACKGROUND * overall
