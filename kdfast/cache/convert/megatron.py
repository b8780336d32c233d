"""``Megatron``: the offline-distillation shards of Megatron-Core, with the tokens that belong to them.

The facts are those of github.com/NVIDIA/Megatron-LM (``megatron/training/distillation``); the code is ours.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.convert.source import Record, Source
from kdfast.cache.errors import CacheCorruptError, CacheError, optional_package

__all__ = ["Megatron"]

TAR = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
MEMBER = re.compile(r"(\d+)\.pt\.zst")
META = "_meta.json"
TENSORS = ("values", "indices_low", "bit_17")
# An entry outside a row's nucleus: id -1, all ones in 17 bits, at a value of -1e4 (-1e3 in other versions).
PADDING_ID, PADDING_VALUE = 2**17 - 1, -1e3


class Megatron(Source):
    """A folder of ``cp0_dp<rank>__<iteration>.tar``, which are keyed by the run's position, not by content.

    A tar holds ``_meta.json`` and per iteration ``<iteration>.pt.zst``: a torch.save of lists, one tensor of
    (tokens, samples, K) per microbatch: ``values`` (log-probabilities), ``indices_low`` (uint16) and ``bit_17``
    (bool). So the samples' tokens must be given: which they were only the run knows.

    Args:
        path: the folder.
        tokens: JSON lines, one per sample: ``{"iteration": 1, "dp": 0, "microbatch": 0, "sample": 0, "input_ids":
            [...]}``; ``sample`` counts within the microbatch.

    Raises:
        CacheError: zstandard is not installed, a sample's tokens are missing, or the capture was sharded over the
            sequence (context parallelism), which reorders positions.
        CacheCorruptError: a file is not what Megatron writes.
    """

    what = "Megatron-Core offline logits"

    def __init__(self, path: Path, tokens: Path) -> None:
        optional_package("zstandard", "reading Megatron-Core shards")
        self._tars = _tars(path)
        self._tokens = _Tokens(tokens)
        self.size = len(self._tokens)
        saver = _saver(self._tars[0][1])
        self.k = int(saver["k"])
        self.value_dtype = "float16" if saver.get("save_dtype") == "fp16" else "float32"

    def __iter__(self) -> Iterator[Record]:
        for rank, path in self._tars:
            for iteration, data in _members(path):
                where = f"{path}: iteration {iteration}"
                for microbatch, (values, ids) in enumerate(_decode(where, data)):
                    for sample in range(values.shape[1]):
                        name = f"{where}, microbatch {microbatch}, sample {sample}"
                        tokens = self._tokens.find(name, (iteration, rank, microbatch, sample))
                        yield _record(name, tokens, ids[:, sample], values[:, sample])


@dataclass(frozen=True)
class _Line:
    offset: int
    number: int


class _Tokens:
    """The tokens file. Only the places of its lines are held in memory; a line is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[tuple[int, ...], _Line] = {}
        offset = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._add(line, _Line(offset, number))
                offset += len(line)

    def _add(self, text: bytes, line: _Line) -> None:
        try:
            row = json.loads(text)
            place = tuple(int(row[name]) for name in ("iteration", "dp", "microbatch", "sample"))
            row["input_ids"]
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"{self._path}: line {line.number} is not a sample's tokens: {error!r}") from error
        if place in self._lines:
            raise CacheError(f"{self._path}: lines {self._lines[place].number} and {line.number} are of one sample")
        self._lines[place] = line

    def __len__(self) -> int:
        return len(self._lines)

    def find(self, name: str, place: tuple[int, int, int, int]) -> NDArray[np.int64]:
        if place not in self._lines:
            raise CacheError(f"{name}: {self._path} has no tokens for it")
        with self._path.open("rb") as lines:
            lines.seek(self._lines[place].offset)
            return np.asarray(json.loads(lines.readline())["input_ids"], np.int64)


def _tars(path: Path) -> list[tuple[int, Path]]:
    """Pairs of a data-parallel rank and a file, sorted by rank and iteration."""
    found = [(match, file) for file in path.iterdir() if (match := TAR.fullmatch(file.name))]
    if not found:
        raise CacheError(f"{path}: holds no cp<rank>_dp<rank>__<iteration>.tar")
    for match, file in found:
        if int(match[1]):
            raise CacheError(
                f"{file}: was captured with context parallelism: each file holds some positions of every sample, in an "
                f"order that depends on that run. Only captures without it can be imported"
            )
    ordered = sorted((int(match[2]), int(match[3]), file) for match, file in found)
    return [(rank, file) for rank, _, file in ordered]


def _saver(path: Path) -> dict[str, Any]:
    """The capture's settings, from the metadata in the tar."""
    for name, data in _files(path):
        if name == META:
            try:
                saver = json.loads(data)["saver"]
                saver["k"]
            except (KeyError, TypeError, ValueError) as error:
                raise CacheCorruptError(f"{path}: its {META} does not say k: {error!r}") from error
            return dict(saver)
    raise CacheCorruptError(f"{path}: lacks {META}")


def _members(path: Path) -> Iterator[tuple[int, bytes]]:
    for name, data in _files(path):
        if match := MEMBER.fullmatch(name):
            yield int(match[1]), data


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    yield member.name, file.read()
    except tarfile.TarError as error:
        raise CacheCorruptError(f"{path}: is not a readable tar file: {error}") from error


def _decode(where: str, data: bytes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield per microbatch (tokens, samples, K) log-probabilities in float64, and ids of the same shape."""
    zstandard = optional_package("zstandard", "reading Megatron-Core shards")
    try:
        raw = zstandard.ZstdDecompressor().decompress(data)
        tensors = torch.load(io.BytesIO(raw), weights_only=True)
        lists = [tensors[name] for name in TENSORS]
        for values, low, high in zip(*lists, strict=True):
            if values.dim() != 3 or not values.shape == low.shape == high.shape:
                raise ValueError(f"shapes {tuple(values.shape)}, {tuple(low.shape)} and {tuple(high.shape)}")
            yield values.double(), high.long() << 16 | low.long()
    except (zstandard.ZstdError, pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CacheCorruptError(f"{where}: is not what Megatron-Core writes: {error}") from error


def _record(name: str, tokens: NDArray[np.int64], ids: Tensor, values: Tensor) -> Record:
    if len(tokens) != len(values):
        raise CacheError(f"{name}: has {len(values)} rows, but its tokens are {len(tokens)}")
    real = ~((ids == PADDING_ID) & (values <= PADDING_VALUE))
    return Record(name, tokens, real.sum(1).numpy(), ids[real].numpy(), values[real].numpy())
