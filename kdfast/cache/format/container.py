"""The bytes of a shard file: safetensors, with a last tensor that seals everything but the payload.

safetensors itself accepts most bit flips in its header, and all in its data. Here the seal holds the CRC-32C of the
header and of the tables; the payload has one CRC-32C per block, in the tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdfast._C import crc32c
from kdfast.cache.errors import CacheCorruptError
from kdfast.cache.format.regular import map_file
from kdfast.cache.format.strict import parse_json

__all__ = [
    "Container",
    "pack",
    "pack_sealed",
    "read_container",
    "reserve",
]

ALIGN = 8
SEAL_BYTES = 8
MAX_HEADER = 100_000_000  # the safetensors library's own limit
LARGEST = 2**56  # of any dimension: no file is that long
DTYPES = {"U8": "u1", "U32": "<u4", "I64": "<i8", "U64": "<u8"}
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
# Every tensor in file order: its dtype and its shape without the leading dimension.
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
    """A sealed file that has been checked, but for its payload, which stays on disk. An index has no payload."""

    metadata: dict[str, str]
    payload_start: int
    payload_bytes: int
    tables: dict[str, NDArray[Any]]
    seal: bytes
    file_bytes: int
    mapped: NDArray[np.uint8]  # the whole file: the tables are views of it


def pack(
    metadata: dict[str, str], payload_bytes: int, tables: dict[str, NDArray[Any]], reserved: int = 0
) -> tuple[bytes, bytes]:
    """The bytes of a shard before its payload, and those after it.

    Args:
        tables: those of ``TABLES``, of which the ``OPTIONAL`` ones may be left out; the padding is made here.
        reserved: the length of the first part, as ``reserve`` gives it; as short as can be if 0.
    """
    padding = np.zeros(-payload_bytes % ALIGN, np.uint8)
    data = {name: table.astype(DTYPES[LAYOUT[name][0]]) for name, table in {"padding": padding, **tables}.items()}
    names = [name for name in TABLES if name in data]
    shapes = {"payload": (payload_bytes,), **{name: data[name].shape for name in names}, "seal": (2,)}
    header = _header(metadata, shapes, reserved)
    body = b"".join(data[name].tobytes() for name in names)
    return header, body + _seal(header, body)


def reserve(metadata: dict[str, str], optional: Iterable[str]) -> int:
    """How many bytes a header can take, whatever its sizes turn out to be, with the ``optional`` tables named."""
    names = [name for name in LAYOUT if name not in OPTIONAL or name in optional]
    return len(_header(metadata, {name: (LARGEST, *LAYOUT[name][1]) for name in names}))


def pack_sealed(metadata: dict[str, str], tables: Mapping[str, NDArray[Any]], layout: Layout) -> list[bytes]:
    """The bytes of a sealed file without payload, in pieces. ``layout`` ends with ``seal``, which is made here."""
    data = {name: tables[name].astype(DTYPES[layout[name][0]]) for name in layout if name != "seal"}
    header = _header(metadata, {**{name: table.shape for name, table in data.items()}, "seal": (2,)}, 0, layout)
    body = b"".join(table.tobytes() for table in data.values())
    return [header, body + _seal(header, body)]


def _header(
    metadata: dict[str, str], shapes: dict[str, tuple[int, ...]], reserved: int = 0, layout: Layout = LAYOUT
) -> bytes:
    """A safetensors header: its length, then JSON padded with spaces, so that the data starts on a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        dtype = layout[name][0]
        begin, end = end, end + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(reserved - 8)
    text += b" " * (-len(text) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def _seal(header: bytes, body: bytes | NDArray[np.uint8]) -> bytes:
    return np.array([crc32c(header), crc32c(body)], "<u4").tobytes()


def read_container(path: Path, layout: Layout = LAYOUT) -> Container:
    """Map a sealed file into memory, and check everything but the payload.

    Raises:
        CacheCorruptError: the file is truncated or no regular one, or its header or tables are not what was written.
        OSError: the file cannot be read.
    """
    data = map_file(path)
    try:
        return _parse(data, layout)
    except (ValueError, OverflowError) as error:
        raise CacheCorruptError(f"{path}: {error}") from error


def _parse(data: NDArray[np.uint8], layout: Layout) -> Container:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(len(data) - 8, MAX_HEADER):
        raise ValueError(f"truncated or corrupt: a header of {length} bytes in a file of {len(data)}")
    start = 8 + length
    header = data[:start].tobytes()
    metadata, tensors = _parse_header(header[8:], layout)
    end = start + tensors["seal"].begin + SEAL_BYTES
    if end != len(data):
        raise ValueError(f"truncated or corrupt: {end} bytes announced, {len(data)} found")
    payload_bytes = tensors["payload"].end if "payload" in tensors else 0
    body, seal = data[start + payload_bytes : end - SEAL_BYTES], data[end - SEAL_BYTES :].tobytes()
    _check_seal(_seal(header, body), seal)
    names = [name for name in layout if name in tensors and name not in ("payload", "seal")]
    tables = {name: tensors[name].view(body, payload_bytes) for name in names}
    return Container(metadata, start, payload_bytes, tables, seal, len(data), data)


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

    def view(self, body: NDArray[np.uint8], body_begin: int) -> NDArray[Any]:
        return body[self.begin - body_begin : self.end - body_begin].view(DTYPES[self.dtype]).reshape(self.shape)


def _parse_header(text: bytes, layout: Layout) -> tuple[dict[str, str], dict[str, _Tensor]]:
    """Metadata and tensors of a header, in file order. Raises ``ValueError`` for any bytes that are no such header."""
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise ValueError("its header is not a JSON object padded with spaces")
    header = parse_json(text)
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise ValueError("its header is not a JSON object with __metadata__")
    metadata = header.pop("__metadata__")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ holds values that are not strings")
    tensors = dict(
        sorted(((name, _tensor(name, entry, layout)) for name, entry in header.items()), key=lambda t: t[1].begin)
    )
    # A later version may add tables: they are sealed like the others and otherwise ignored.
    missing = [name for name in layout if name not in tensors and name not in OPTIONAL]
    if missing:
        raise ValueError(f"its header lacks {missing}")
    names, begins = list(tensors), [tensor.begin for tensor in tensors.values()]
    ends = [tensor.end for tensor in tensors.values()]
    first, *_, last = layout
    if names[0] != first or names[-1] != last or tensors[last].shape != (2,) or begins != [0, *ends[:-1]]:
        raise ValueError(f"its tensors do not follow one another from {first} to {last}")
    return metadata, tensors


def _tensor(name: str, entry: Any, layout: Layout) -> _Tensor:
    try:
        tensor = _Tensor(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header entry {name!r:.80} is malformed: {_show(entry)}") from error
    numbers = (*tensor.shape, tensor.begin, tensor.end)
    if not all(type(number) is int and 0 <= number <= LARGEST for number in numbers) or tensor.end < tensor.begin:
        raise ValueError(f"its header entry {name!r:.80} has impossible sizes: {_show(entry)}")
    if name in layout and not _fits(tensor, *layout[name]):
        raise ValueError(f"its tensor {name!r} is {_show(entry)}, not {layout[name]}")
    return tensor


def _show(entry: Any) -> str:
    return json.dumps(entry)[:80]


def _fits(tensor: _Tensor, dtype: str, columns: tuple[int, ...]) -> bool:
    if len(tensor.shape) != 1 + len(columns):
        return False
    size = math.prod(tensor.shape) * np.dtype(DTYPES[dtype]).itemsize
    return tensor.dtype == dtype and tensor.shape[1:] == columns and size == tensor.end - tensor.begin
