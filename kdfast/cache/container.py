"""The bytes of a shard file: safetensors, with a last tensor that seals everything but the payload.

safetensors itself accepts most bit flips in its header, and all in its data. Here the seal holds the CRC-32C of the
header and of the tables; the payload has one CRC-32C per block, in the tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdfast._C import crc32c
from kdfast.cache.errors import CacheCorruptError, naming

__all__ = ["Container", "map_file", "pack", "pack_sealed", "parse_container", "parse_sealed", "read_container"]

ALIGN = 8
SEAL_BYTES = 8
MAX_HEADER = 100_000_000  # the safetensors library's own limit
DTYPES = {"U8": "u1", "U32": "<u4", "I64": "<i8", "U64": "<u8"}
# Every tensor in file order: its dtype and its shape without the leading dimension.
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
LAYOUT: Layout = {
    "payload": ("U8", ()),
    "padding": ("U8", ()),
    "block_index": ("I64", (4,)),
    "record_spans": ("I64", (2,)),
    "record_keys": ("U8", (16,)),
    "block_crc": ("U32", ()),
    "record_targets": ("U32", ()),
    "row_views": ("U8", (13,)),
    "codec_model": ("U8", ()),
    "seal": ("U32", ()),
}
OPTIONAL = ("record_targets", "row_views", "codec_model")  # there where they hold something
TABLES = [name for name in LAYOUT if name not in ("payload", "seal")]


@dataclass(frozen=True)
class Container:
    """A shard's parts, checked, apart from the payload, which is not read. Arrays are views of the mapped file."""

    metadata: dict[str, str]
    payload_start: int
    payload: NDArray[np.uint8]
    tables: dict[str, NDArray[Any]]
    seal: bytes
    file_bytes: int

    @property
    def payload_bytes(self) -> int:
        return len(self.payload)


def pack(metadata: dict[str, str], payload: list[bytes], tables: dict[str, NDArray[Any]]) -> list[bytes]:
    """A shard file, in pieces. ``tables`` holds those of ``TABLES``; the padding is made here."""
    size = sum(map(len, payload))
    padding = np.zeros(-size % ALIGN, np.uint8)
    data = {name: table.astype(DTYPES[LAYOUT[name][0]]) for name, table in {"padding": padding, **tables}.items()}
    names = [name for name in TABLES if name in data]
    shapes = {"payload": (size,), **{name: data[name].shape for name in names}, "seal": (2,)}
    header = _header(metadata, shapes)
    body = b"".join(data[name].tobytes() for name in names)
    return [header, *payload, body, _seal(header, body)]


def pack_sealed(metadata: dict[str, str], tables: dict[str, NDArray[Any]], layout: Layout) -> list[bytes]:
    """A file of tables alone, sealed as a shard is, in pieces. ``layout`` ends with ``seal``, which is made here."""
    data = {name: tables[name].astype(DTYPES[layout[name][0]]) for name in layout if name != "seal"}
    header = _header(metadata, {**{name: table.shape for name, table in data.items()}, "seal": (2,)}, layout)
    body = b"".join(table.tobytes() for table in data.values())
    return [header, body, _seal(header, body)]


def _header(metadata: dict[str, str], shapes: dict[str, tuple[int, ...]], layout: Layout = LAYOUT) -> bytes:
    """The length, then JSON, padded with spaces so that the data starts on a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        dtype = layout[name][0]
        begin, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def _seal(header: bytes | NDArray[np.uint8], body: bytes | NDArray[np.uint8]) -> bytes:
    return np.array([crc32c(header), crc32c(body)], "<u4").tobytes()


def map_file(path: Path) -> NDArray[np.uint8]:
    """A file's bytes, mapped into memory: nothing is read before it is used, and no page is this process's own.

    Raises ``ValueError`` for an empty file.
    """
    return np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array slices faster


def read_container(path: Path) -> Container:
    """Map a shard, and check everything but the payload.

    Raises:
        CacheCorruptError: the file is truncated, or its header or tables are not what was written.
        OSError: the file cannot be read.
    """
    with naming(path):
        try:
            return parse_container(map_file(path))
        except (ValueError, RecursionError) as error:
            raise CacheCorruptError(f"{path}: {error}") from error


def parse_container(data: NDArray[np.uint8]) -> Container:
    """The same of a file's bytes. Raises ``ValueError`` or ``RecursionError`` if they are not a shard's."""
    metadata, tables, begin = parse_sealed(data, LAYOUT, OPTIONAL)
    return Container(metadata, begin, tables.pop("payload"), tables, tables.pop("seal").tobytes(), len(data))


def parse_sealed(
    data: NDArray[np.uint8], layout: Layout, optional: tuple[str, ...] = ()
) -> tuple[dict[str, str], dict[str, NDArray[Any]], int]:
    """Metadata, the tensors that ``layout`` knows as views of ``data``, and where the first one begins.

    Raises:
        ValueError, RecursionError: not a whole file of that layout, or its seal does not agree.
    """
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data) - 8, MAX_HEADER):
        raise ValueError(f"truncated or corrupt: a header of {length} bytes in a file of {len(data)}")
    start = 8 + length
    metadata, tensors = _parse_header(data[8:start].tobytes(), layout, optional)
    end = start + tensors["seal"].end
    if tensors["seal"].shape != (2,) or end != len(data):
        raise ValueError(f"truncated or corrupt: {end} bytes announced, {len(data)} found")
    sealed_from = tensors["payload"].end if "payload" in tensors else 0
    body = data[start + sealed_from : end - SEAL_BYTES]
    _check_seal(_seal(data[:start], body), data[end - SEAL_BYTES :].tobytes())
    return metadata, {name: tensors[name].view(data, start) for name in layout if name in tensors}, start


def _check_seal(found: bytes, sealed: bytes) -> None:
    for part, ours, theirs in zip(("header", "tables"), _words(found), _words(sealed), strict=True):
        if ours != theirs:
            raise ValueError(f"the CRC of its {part} is {ours:08x}, but its seal says {theirs:08x}")


def _words(seal: bytes) -> list[int]:
    return [int(word) for word in np.frombuffer(seal, "<u4")]


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, data: NDArray[np.uint8], start: int) -> NDArray[Any]:
        return data[start + self.begin : start + self.end].view(DTYPES[self.dtype]).reshape(self.shape)


def _parse_header(
    text: bytes, layout: Layout, optional: tuple[str, ...]
) -> tuple[dict[str, str], dict[str, _Tensor]]:
    """Metadata and tensors, in file order. Any bytes may come in; ``ValueError`` unless they are such a header."""
    header = json.loads(text)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("its header is not a JSON object with __metadata__")
    metadata = header.pop("__metadata__")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ holds values that are not strings")
    tensors = dict(sorted(((name, _tensor(name, entry, layout)) for name, entry in header.items()), key=lambda t: t[1].begin))
    # A later version may add tables: they are sealed like the others and otherwise ignored.
    missing = [name for name in layout if name not in tensors and name not in optional]
    if missing:
        raise ValueError(f"its header lacks {missing}")
    names, begins = list(tensors), [tensor.begin for tensor in tensors.values()]
    ends = [tensor.end for tensor in tensors.values()]
    first, *_, last = layout
    if names[0] != first or names[-1] != last or begins != [0, *ends[:-1]]:
        raise ValueError(f"its tensors do not follow one another from {first} to {last}")
    return metadata, tensors


def _tensor(name: str, entry: Any, layout: Layout) -> _Tensor:
    try:
        tensor = _Tensor(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header entry {name!r} is malformed: {entry!r:.80}") from error
    numbers = (*tensor.shape, tensor.begin, tensor.end)
    if not all(type(number) is int and number >= 0 for number in numbers) or tensor.end < tensor.begin:
        raise ValueError(f"its header entry {name!r} has impossible sizes: {entry!r:.80}")
    if name in layout and not _fits(tensor, *layout[name]):
        raise ValueError(f"its tensor {name!r} is {entry!r:.80}, not {layout[name]}")
    return tensor


def _fits(tensor: _Tensor, dtype: str, columns: tuple[int, ...]) -> bool:
    size = math.prod(tensor.shape) * np.dtype(DTYPES[dtype]).itemsize
    return tensor.dtype == dtype and tensor.shape[1:] == columns and size == tensor.end - tensor.begin
