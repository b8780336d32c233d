"""``Megatron``: the offline-distillation shards of Megatron-Core, with the tokens that belong to them.

The facts are those of github.com/NVIDIA/Megatron-LM (``megatron/training/distillation``); the code is ours.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.convert.limits import ExpansionError, most_bytes
from kdfast.cache.convert.source import Record, Source, token_ids
from kdfast.cache.errors import CacheCorruptError, CacheError, optional_package
from kdfast.cache.format.regular import open_regular
from kdfast.cache.format.strict import parse_json

__all__ = ["Megatron"]

TAR = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
MEMBER = re.compile(r"(\d+)\.pt\.zst")
META = "_meta.json"
TENSORS = ("values", "indices_low", "bit_17")
CHUNK = 2**20  # bytes unpacked at a time
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
        max_bytes: what one iteration may take once it is unpacked. Default: 256 MiB, or 64 times what it takes in the
            file if that is more.

    Raises:
        ExpansionError: an iteration takes more than ``max_bytes``.
        CacheError: zstandard is not installed, a sample's tokens are missing, or the capture was sharded over the
            sequence (context parallelism), which reorders positions.
        CacheCorruptError: a file is not what Megatron writes.
    """

    what = "Megatron-Core offline logits"

    def __init__(self, path: Path, tokens: Path, max_bytes: int | None = None) -> None:
        optional_package("zstandard", "reading Megatron-Core shards")
        self._tars = _tars(path)
        self._tokens, self._max_bytes = _Tokens(tokens), max_bytes
        self.size = len(self._tokens)
        saver = _saver(self._tars[0][1])
        self.k = saver["k"]
        self.value_dtype = "float16" if saver.get("save_dtype") == "fp16" else "float32"

    def __iter__(self) -> Iterator[Record]:
        for rank, path in self._tars:
            for iteration, data in _members(path):
                where = f"{path}: iteration {iteration}"
                for microbatch, (values, ids) in enumerate(_decode(where, data, self._max_bytes)):
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
        with open_regular(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self._add(line, _Line(offset, number))
                offset += len(line)

    def _add(self, text: bytes, line: _Line) -> None:
        try:
            row = parse_json(text)
            place = tuple(index(row[name]) for name in ("iteration", "dp", "microbatch", "sample"))
            row["input_ids"]
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise CacheError(f"{self._path}: line {line.number} is not a sample's tokens: {error!r:.200}") from error
        if place in self._lines:
            raise CacheError(f"{self._path}: lines {self._lines[place].number} and {line.number} are of one sample")
        self._lines[place] = line

    def __len__(self) -> int:
        return len(self._lines)

    def find(self, name: str, place: tuple[int, int, int, int]) -> NDArray[np.int64]:
        if place not in self._lines:
            raise CacheError(f"{name}: {self._path} has no tokens for it")
        line = self._lines[place]
        with open_regular(self._path) as lines:
            lines.seek(line.offset)
            try:
                return token_ids(json.loads(lines.readline())["input_ids"])
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                raise CacheError(f"{self._path}: line {line.number}: its input_ids are no ids: {error}") from error


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
                saver = dict(parse_json(data)["saver"])
                k = saver["k"]
            except (LookupError, TypeError, ValueError) as error:
                raise CacheCorruptError(f"{path}: its {META} does not say k: {error!r:.200}") from error
            if type(k) is not int or not 1 <= k <= PADDING_ID:
                raise CacheCorruptError(f"{path}: its {META} says k {k!r:.60}, which is no number of entries")
            return saver
    raise CacheCorruptError(f"{path}: lacks {META}")


def _members(path: Path) -> Iterator[tuple[int, bytes]]:
    for name, data in _files(path):
        if match := MEMBER.fullmatch(name):
            yield int(match[1]), data


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    with open_regular(path) as whole:
        size = path.stat().st_size
        try:
            with tarfile.open(fileobj=whole, mode="r:") as tar:  # Megatron compresses members, not the file
                for member in tar:
                    if member.isreg() and (member.issparse() or not 0 <= member.size <= size):
                        raise CacheCorruptError(
                            f"{path}: {member.name!r:.80} claims {member.size} bytes in a file of {size}, or has holes"
                        )
                    file = tar.extractfile(member) if member.isreg() else None
                    if file is not None:
                        yield member.name, file.read()
        except (tarfile.TarError, ArithmeticError, EOFError, UnicodeError) as error:
            raise CacheCorruptError(f"{path}: is not a readable tar file: {error}") from error


def _decode(where: str, data: bytes, max_bytes: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield per microbatch (tokens, samples, K) log-probabilities in float64, and ids of the same shape."""
    zstandard = optional_package("zstandard", "reading Megatron-Core shards")
    most = most_bytes(max_bytes, len(data))
    try:
        parts, size = [], 0
        with zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(data) as reader:
            while part := reader.read(CHUNK):
                parts.append(part)
                size += len(part)
                if size > most:
                    raise ExpansionError.of(where, None, most)
        raw = b"".join(parts)
        _check_zip(where, raw, most)
        tensors = torch.load(io.BytesIO(raw), weights_only=True)
        lists = [tensors[name] for name in TENSORS]
        for values, low, high in zip(*lists, strict=True):
            _check_tensors(values, low, high)
            yield values.detach().double(), high.long() << 16 | low.long()
    except CacheError:
        raise
    except (
        zstandard.ZstdError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CacheCorruptError(f"{where}: is not what Megatron-Core writes: {error}") from error


def _check_tensors(values: Tensor, low: Tensor, high: Tensor) -> None:
    """Raise ``ValueError`` unless they are the tensors of one microbatch, and the file holds what is in them."""
    if values.dim() != 3 or not values.shape == low.shape == high.shape:
        raise ValueError(f"shapes {tuple(values.shape)}, {tuple(low.shape)} and {tuple(high.shape)}")
    if not values.is_floating_point() or any(x.is_floating_point() or x.is_complex() for x in (low, high)):
        raise ValueError(f"dtypes {values.dtype}, {low.dtype} and {high.dtype}")
    for x in (values, low, high):
        # A view that repeats its memory, with strides of 0, stands for any number of values; a meta tensor for none.
        if x.layout != torch.strided or x.device.type != "cpu" or x.numel() > x.untyped_storage().nbytes():
            raise ValueError(f"tensors of {values.numel()} values that the file does not hold")


def _check_zip(where: str, raw: bytes, most: int) -> None:
    """Raise unless ``raw`` is a zip file as torch.save writes it: its members stored, not compressed once more."""
    total = 0
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        for member in archive.infolist():
            total += member.file_size
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"{member.filename!r:.80} is compressed, which torch.save does not do")
    if total > len(raw):
        raise ExpansionError.of(where, total, min(most, len(raw)))


def _record(name: str, tokens: NDArray[np.int64], ids: Tensor, values: Tensor) -> Record:
    if len(tokens) != len(values):
        raise CacheError(f"{name}: has {len(values)} rows, but its tokens are {len(tokens)}")
    real = ~((ids == PADDING_ID) & (values <= PADDING_VALUE))
    return Record(name, tokens, real.sum(1).numpy(), ids[real].numpy(), values[real].numpy())
