"""Feeding a training loop: a dataset that yields labels with its examples, and a sampler that resumes anywhere.

data = kdfast.cache.CacheDataset(cache, keys, examples)
sampler = kdfast.cache.ElasticSampler(len(data), batch_size=512, seed=0, rank=rank, world_size=world_size)
loader = DataLoader(data, batch_sampler=sampler, collate_fn=data.collate, num_workers=8, pin_memory=True)
for epoch in range(epochs):
    for batch, teacher in loader:
        loss = kd_loss(student(batch), teacher)  # and its backward pass, and the optimizer's step
        sampler.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from kdfast.cache.read.agreement import check_labels
from kdfast.cache.read.gather import ranges
from kdfast.cache.read.lookup import RecordIndex
from kdfast.cache.read.packed import PackedLabels
from kdfast.cache.read.reader import CacheReader
from kdfast.cache.read.spans import check_several
from kdfast.cache.selection.select import GOLDEN, splitmix64
from kdfast.labels import SoftLabels

__all__ = ["CacheDataset", "ElasticSampler"]


def _concatenate(labels: list[Any], *, collate_fn_map: Any = None) -> Any:
    """What ``default_collate`` makes of a batch of labels: those of all examples, row after row."""
    return type(labels[0]).cat(labels) if isinstance(labels[0], PackedLabels) else SoftLabels.cat(labels)


# A data set may give (x, cache[key]) and be loaded by a DataLoader as it is.
default_collate_fn_map.update({SoftLabels: _concatenate, PackedLabels: _concatenate})


class _Item(NamedTuple):
    example: Any
    position: int


class CacheDataset(Dataset[_Item]):
    """Examples with their labels: a map-style dataset for ``torch.utils.data.DataLoader``.

    An item is (example, position): it carries no labels. ``collate`` turns the items of a batch into
    (batch, ``PackedLabels``), reading the batch's labels at once, in the loader's worker. Keys are looked up when the
    dataset is made. It pickles, without the cache's data, for workers of any start method.

    Args:
        cache: the labels.
        keys: one per example, as ``cache.gather`` takes them, spans included; an example whose rows come from several
            records, as packed documents do, has a list of them. A column of lists of ids serves too, and a
            ``RecordIndex``.
        examples: what belongs to each key, such as token ids or an image: anything with a length and positions. The
            position stands for the example if None.
        collate: makes a batch of a list of examples.
        compare_targets: compare the labels of a batch, the field ``labels`` of a mapping or the second item of a tuple,
            with the targets that the cache was captured with, where an example has one whole record. False for labels
            that are meant to differ.

    A batch's labels are concatenated, without padding: of padded tokens the student's rows are taken by
    ``attention_mask.bool()``, or each example's keys are ``mask_spans(key, mask)``, which pad to the mask's length.

    Raises:
        KeyError: a key is not in the cache.
        ValueError: keys and examples differ in number, or a span goes beyond its record.
        CacheMismatchError: from ``collate``: labels are not the targets of their records.
    """

    def __init__(
        self,
        cache: CacheReader,
        keys: Iterable[Any] | RecordIndex,
        examples: Sequence[Any] | Dataset[Any] | Tensor | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
        *,
        compare_targets: bool = True,
    ) -> None:
        self._cache, self._examples, self._collate, self._compare = cache, examples, collate, compare_targets
        self._index, self._first = _look_up(cache, keys)
        size = len(self)
        if examples is not None and len(examples) != size:  # type: ignore[arg-type]
            raise ValueError(f"each example needs a key, got {len(examples)} examples and {size} keys")  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._index) if self._first is None else len(self._first) - 1

    def __getitem__(self, position: int) -> _Item:
        return _Item(position if self._examples is None else self._examples[position], position)

    def collate(self, items: Sequence[_Item]) -> tuple[Any, PackedLabels]:
        """Make (batch, its labels) of some items. It is ``DataLoader``'s ``collate_fn``."""
        positions = np.array([position for _, position in items], np.int64)
        if self._first is not None:
            begin = self._first[positions]
            positions = ranges(begin, self._first[positions + 1] - begin)
        batch, index = self._collate([example for example, _ in items]), self._index[positions]
        if self._compare and self._first is None and index.spans is None:
            _compare(self._cache, index, batch)
        return batch, self._cache.pack(index)


def _compare(cache: CacheReader, index: RecordIndex, batch: Any) -> None:
    """Compare a batch's labels with the targets of its records, which are whole."""
    if isinstance(batch, Mapping):
        labels, real = batch.get("labels"), batch.get("attention_mask")
    else:
        labels, real = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None, None
    same = isinstance(labels, Tensor) and isinstance(real, Tensor) and labels.shape == real.shape
    check_labels(cache, index, None, labels, batch, real.bool().cpu().numpy() if same and real is not None else None)


def _look_up(cache: CacheReader, keys: Iterable[Any] | RecordIndex) -> tuple[RecordIndex, NDArray[np.int64] | None]:
    """The index of all keys; where examples have lists of them also each example's first key, and the end."""
    if isinstance(keys, RecordIndex):
        return keys, None
    if isinstance(keys, (Tensor, np.ndarray, range)):
        return cache.index(keys), None
    check_several(keys, cache)
    entries = list(keys)
    # A list of ints may be ids, as a column of a data set has them, or keys that are ints: the cache tells.
    if not any(isinstance(entry, list) for entry in entries) or _are_ids(cache, entries):
        return cache.index(entries), None
    lists = [entry if isinstance(entry, list) else [entry] for entry in entries]
    return cache.index(key for keys in lists for key in keys), np.cumsum([0, *map(len, lists)])


def _are_ids(cache: CacheReader, entries: Sequence[Any]) -> bool:
    """Whether every entry is a list of ints, and the first ones are the ids of records."""
    plain = all(isinstance(entry, list) and all(isinstance(i, int) for i in entry) for entry in entries)
    return plain and all(entry in cache for entry in entries[:2])


class ElasticSampler(Sampler[list[int]]):
    """Batches of shuffled positions for ``DataLoader``'s ``batch_sampler``, resumable on any number of ranks.

    The order of an epoch is a pure function of (seed, epoch), the same with every version of every library, and is
    never held in memory. It is cut into global batches, of which rank r takes every ``world_size``-th position from
    the r-th on. So the state is (seed, epoch, samples consumed): training that stops on 8 ranks resumes on 2, within an
    epoch, and sees the same global batches.

    A loader asks for batches ahead of the training loop, so the loop tells what it has consumed: call ``step`` after
    each batch. The step that ends an epoch begins the next one; a loop over the loader is over one epoch, or what is
    left of it.

    Args:
        size: positions, 0 ... size - 1.
        batch_size: samples of a global batch, over all ranks.
        seed: of the order.
        rank, world_size: which part of each batch this process takes.
        drop_last: leave out the incomplete batch at an epoch's end (other samples every epoch).

    Raises:
        ValueError: a number out of range, or a batch that the ranks cannot share evenly.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, *, drop_last: bool = False
    ) -> None:
        if size < 1 or batch_size < 1 or not 0 <= rank < world_size or not 0 <= seed < 2**64:
            raise ValueError(
                "size and batch_size must be positive, rank in [0, world_size) and seed in [0, 2**64), got "
                f"size {size}, batch_size {batch_size}, rank {rank}, world_size {world_size} and seed {seed}"
            )
        rest = 0 if drop_last else size % batch_size
        if batch_size % world_size or rest % world_size:
            raise ValueError(
                f"batches of {batch_size} out of {size}, the last one of {rest or batch_size}, cannot be shared by "
                f"{world_size} ranks evenly; drop_last leaves out an incomplete one"
            )
        if drop_last and size < batch_size:
            raise ValueError(f"drop_last leaves nothing of {size} samples in batches of {batch_size}")
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.epoch = self.samples_consumed = 0
        self._drop_last = drop_last
        self._exhausted = False  # a loop has had all batches, and has reported none of them

    def __len__(self) -> int:
        """The number of batches left in this epoch."""
        left = self.size - self.samples_consumed
        return left // self.batch_size if self._drop_last else -(-left // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self._exhausted:
            raise RuntimeError("an epoch has passed without a step: call ElasticSampler.step() after each batch")
        epoch, start = self.epoch, self.samples_consumed
        for number in range(len(self)):
            first = start + number * self.batch_size
            places = np.arange(first + self.rank, min(first + self.batch_size, self.size), self.world_size)
            yield permute(places, self.size, self.seed, epoch).tolist()
        self._exhausted = (epoch, start) == (self.epoch, self.samples_consumed)

    def step(self) -> None:
        """Count one global batch as consumed."""
        self._exhausted = False
        self.samples_consumed += self.batch_size
        if not len(self) or self.samples_consumed >= self.size:
            self.epoch, self.samples_consumed = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The position after the last ``step``, as ``load_state_dict`` takes it. It is the same on every rank."""
        return {
            "size": self.size,
            "seed": self.seed,
            "epoch": self.epoch,
            "samples_consumed": self.samples_consumed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a ``state_dict``. Rank, number of ranks and batch size stay this sampler's own.

        Raises:
            ValueError: the state is of another number of samples, or what is left cannot be shared evenly.
        """
        if state["size"] != self.size:
            raise ValueError(f"the state is of a sampler of {state['size']} samples, this one has {self.size}")
        rest = (self.size - state["samples_consumed"]) % self.batch_size
        if not self._drop_last and rest % self.world_size:
            raise ValueError(f"the last batch would have {rest} samples, which {self.world_size} ranks cannot share")
        self.seed, self.epoch, self.samples_consumed = state["seed"], state["epoch"], state["samples_consumed"]
        self._exhausted = False
        if not len(self):  # what is left is less than a batch of this size
            self.epoch, self.samples_consumed = self.epoch + 1, 0


def permute(places: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The samples at ``places`` of an epoch's order, which is a pseudorandom permutation of 0 ... size - 1.

    A Feistel network permutes the numbers below the next power of two; one beyond ``size`` is permuted again until it
    is within (cycle walking).
    """
    bits = max(2, (size - 1).bit_length())
    low_bits = bits // 2
    keys = _mix(np.uint64(seed) + _mix(np.arange(ROUNDS, dtype=np.uint64) + np.uint64(epoch * ROUNDS)))
    order = places.astype(np.uint64)
    beyond = np.arange(len(order))
    while len(beyond):
        order[beyond] = _feistel(order[beyond], np.uint64(bits - low_bits), np.uint64(low_bits), keys)
        beyond = beyond[order[beyond] >= size]
    return order.astype(np.int64)


ROUNDS = 8  # even, so that the halves end with the widths they began with


def _feistel(x: NDArray[np.uint64], high: np.uint64, low: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of numbers of ``high + low`` bits, chosen by ``keys``."""
    one = np.uint64(1)
    left, right = x >> low, x & ((one << low) - one)
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & ((one << high) - one))
        high, low = low, high
    return left << low | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64 from the state ``x``."""
    return splitmix64(np.atleast_1d(x) + np.uint64(GOLDEN))
