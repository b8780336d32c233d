"""``PackedLabels``: labels as the cache stores them, decoded where and when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import Codec
from kdfast.cache.errors import CacheCorruptError
from kdfast.cache.read.decoder import Decoder
from kdfast.labels.floor import Floor
from kdfast.labels.ragged import Weights
from kdfast.labels.soft_labels import SoftLabels, row_index

__all__ = ["PackedLabels", "join"]


@dataclass(frozen=True)
class PackedLabels:
    """The labels of some rows, compressed. ``CacheReader.pack`` makes it; ``kd_loss`` takes it as a teacher.

    It is as small as the cache's own bytes, so that a loader's worker can send it and pinned memory hold it. Index it
    by row as ``SoftLabels``: that changes ``wanted`` alone, not the bytes. It pickles for processes of this machine,
    which find the codec through the cache's files.
    """

    data: Tensor  # (bytes,) uint8: the units, in any order
    units: Tensor  # (units, 3) int64: first byte in ``data``, length in bytes, rows
    wanted: Tensor  # (rows,) int64: row numbers, counted over all units one after another
    decoders: tuple[tuple[Decoder, int], ...]  # and how many units each is for, one after another
    present: Tensor | None = None  # (rows,) bool; None: all. An absent row repeats some row, and is not counted
    floor: Floor | None = None  # of the cache that the labels are from
    shrink: float = 0.0  # how far draws are moved to their prototypes when they are decoded

    @classmethod
    def cat(cls, parts: Sequence[PackedLabels]) -> PackedLabels:
        """Concatenate along rows. Raises ``ValueError`` for no part, or parts of different ``shrink``."""
        if not parts:
            raise ValueError("PackedLabels.cat needs at least one part")
        shares = sorted({part.shrink for part in parts})
        if len(shares) > 1:
            raise ValueError(f"cannot concatenate labels of caches that were opened with shrink={shares}")
        units, wanted, nbytes, rows = [], [], 0, 0
        for part in parts:
            units.append(part.units + part.units.new_tensor([nbytes, 0, 0]))
            wanted.append(part.wanted + rows)
            nbytes += part.data.numel()
            rows += int(part.units[:, 2].sum())
        present = None
        if any(part.present is not None for part in parts):
            present = torch.cat([part._present_mask() for part in parts])
        data = torch.cat([part.data for part in parts])
        decoders = join(pair for part in parts for pair in part.decoders)
        floor = parts[0].floor if all(part.floor == parts[0].floor for part in parts) else None
        return cls(data, torch.cat(units), torch.cat(wanted), decoders, present, floor, parts[0].shrink)

    def __len__(self) -> int:
        return self.wanted.numel()

    @property
    def nbytes(self) -> int:
        """The bytes that moving these labels takes, without the codec's tables."""
        tensors = (self.data, self.units, self.wanted, *(() if self.present is None else (self.present,)))
        return sum(x.numel() * x.element_size() for x in tensors)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def codec(self) -> Codec:
        """The codec of the labels; where shards have models of their own, that of the first unit."""
        return self.decoders[0][0].codec

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> PackedLabels:
        index = row_index(rows, len(self), self.device)
        present = None if self.present is None else self.present[index]
        return replace(self, wanted=self.wanted[index], present=present)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedLabels:
        """Return the labels on another device."""
        present = None if self.present is None else self.present.to(device, non_blocking=non_blocking)
        data, units, wanted = (x.to(device, non_blocking=non_blocking) for x in (self.data, self.units, self.wanted))
        return replace(self, data=data, units=units, wanted=wanted, present=present)

    def pin_memory(self) -> PackedLabels:
        """Return the labels in page-locked memory; ``DataLoader(pin_memory=True)`` calls this."""
        present = None if self.present is None else self.present.pin_memory()
        data, units, wanted = (x.pin_memory() for x in (self.data, self.units, self.wanted))
        return replace(self, data=data, units=units, wanted=wanted, present=present)

    def unpack(self) -> SoftLabels:
        """Decode the labels, on the device that the bytes are on.

        On a GPU, with Triton, codecs of entries decode there. Otherwise the CPU decodes, and labels are copied back.

        Raises:
            CacheCorruptError: the bytes are not what the codec writes.
        """
        try:
            labels = self._decode()
        except ValueError as error:
            raise CacheCorruptError(f"packed labels cannot be decoded: {error}") from error
        labels = replace(labels, present=self.present, floor=self.floor)
        return labels.shrunk(self.shrink) if isinstance(labels, Weights) else labels

    def _decode(self) -> SoftLabels:
        units, wanted = (x.cpu().numpy() for x in (self.units, self.wanted))
        if len(self.decoders) == 1 or not len(wanted):
            decoder, count = self.decoders[0]
            return self._decode_with(decoder, units[:count], wanted)
        parts, places, first_unit, first_row = [], [], 0, 0
        for decoder, count in self.decoders:
            own = units[first_unit : first_unit + count]
            rows = int(own[:, 2].sum())
            chosen = ((wanted >= first_row) & (wanted < first_row + rows)).nonzero()[0]
            if len(chosen):
                parts.append(self._decode_with(decoder, own, wanted[chosen] - first_row))
                places.append(torch.from_numpy(chosen))
            first_unit, first_row = first_unit + count, first_row + rows
        return SoftLabels.cat(parts)[torch.cat(places).argsort()]

    def _decode_with(self, decoder: Decoder, units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels:
        labels = decoder.decode_on_device(self.data, units, wanted) if self.data.is_cuda else None
        if labels is None:
            labels = decoder.decode(self.data.cpu().numpy(), units, wanted).to(self.device)
        return labels

    def _present_mask(self) -> Tensor:
        if self.present is None:
            return torch.ones(len(self), dtype=torch.bool, device=self.device)
        return self.present

    def __repr__(self) -> str:
        return f"PackedLabels({self.codec.name}, rows={len(self)}, nbytes={self.nbytes})"


def join(pairs: Iterable[tuple[Decoder, int]]) -> tuple[tuple[Decoder, int], ...]:
    """Run-length encode (decoder, number of units) pairs: neighbours of the same decoder become one."""
    joined: list[tuple[Decoder, int]] = []
    for decoder, count in pairs:
        if joined and joined[-1][0] is decoder:
            count += joined.pop()[1]
        joined.append((decoder, count))
    return tuple(joined)
