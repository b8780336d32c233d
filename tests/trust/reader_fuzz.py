"""Fuzzing the reader: python tests/trust/reader_fuzz.py --seconds 60

It changes golden caches: payloads, tables, metadata and headers of shards, with checksums that are right again;
indexes, manifests, tables of prototypes; journals and parts of a writer that was left. A reader, or a writer that
resumes, must raise a ``CacheError`` or give labels that obey the laws of their codec, in the memory of small files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kdfast.cache
from kdfast._C import crc32c
from kdfast.cache import CacheError
from kdfast.cache.format.container import pack, pack_sealed, read_container
from kdfast.cache.format.sorted_keys import LAYOUT as INDEX_LAYOUT
from laws import violation

V1 = Path(__file__).resolve().parents[1] / "fixtures" / "v1"
SHARD = "shard-0-00000.safetensors"
MOST_MEMORY = 2**31  # of the process, above what it begins with
NUMBERS = [0, 1, -1, 2, 7, 8, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, -(2**63)]
TEXTS = [
    "",
    "0",
    "-1",
    " 1",
    "1_0",
    "1e3",
    "٣",
    "NaN",
    "null",
    "true",
    "[]",
    "{}",
    "[" * 2000,
    "9" * 400,
    "../x",
    "\0",
    "é",
]


class Mutator:
    """Changes to bytes, numbers and JSON, from one random state."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def bytes(self, data: bytes) -> bytes:
        out = bytearray(data)
        for _ in range(self.random.choice([1, 1, 1, 2, 8])):
            at = self.random.randrange(len(out) + 1)
            kind = self.random.randrange(5)
            if kind == 0 and at < len(out):
                out[at] ^= 1 << self.random.randrange(8)
            elif kind == 1 and at < len(out):
                out[at] = self.random.choice([0, 1, 127, 128, 255, self.random.randrange(256)])
            elif kind == 2:
                out[at:at] = self.random.randbytes(self.random.choice([1, 2, 4, 8]))
            elif kind == 3:
                del out[at : at + self.random.choice([1, 2, 8, 64])]
            else:
                size = self.random.choice([2, 4, 8])
                out[at : at + size] = (self.random.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
        return bytes(out)

    def table(self, table: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        out = table.copy()
        kind = self.random.randrange(5)
        if kind == 0 or not out.size:
            return np.concatenate([out, out[: self.random.randrange(3)]])
        if kind == 1:
            return out[: self.random.randrange(len(out) + 1)]
        flat = out.reshape(-1)
        number = self.random.choice(NUMBERS) if kind < 4 else int(flat[0]) + self.random.choice([-1, 1, 100])
        bits = 8 * flat.dtype.itemsize
        flat[self.random.randrange(len(flat))] = (
            np.array(number % 2**bits, np.uint64).astype(f"u{bits // 8}").view(flat.dtype)
        )
        return out

    def value(self, value: Any) -> Any:
        """A JSON value changed somewhere."""
        if isinstance(value, dict) and value and self.random.random() < 0.8:
            name = self.random.choice(sorted(value))
            changed = {**value, name: self.value(value[name])}
            if self.random.random() < 0.2:
                del changed[name]
            return changed
        if isinstance(value, list) and value and self.random.random() < 0.8:
            at = self.random.randrange(len(value))
            return [*value[:at], self.value(value[at]), *value[at + (self.random.random() < 0.8) :]]
        others = [
            None,
            True,
            1.5,
            1e308,
            float("nan"),
            float("inf"),
            [],
            {},
            [value],
            {"x": value},
            str(value),
            10**400,
        ]
        return self.random.choice([*others, *NUMBERS, *TEXTS])

    def text(self, text: str) -> str:
        if self.random.random() < 0.4:
            try:
                return json.dumps(self.value(json.loads(text)))
            except ValueError:
                pass
        if self.random.random() < 0.5:
            return self.random.choice([*TEXTS, str(self.random.choice(NUMBERS))])
        return self.bytes(text.encode()).decode("utf-8", "replace")


# ---- mutations of a cache's folder ----------------------------------------------------------------------------------


def shard(mutate: Mutator, folder: Path) -> None:
    container = read_container(folder / SHARD)
    start = container.payload_start
    payload = (folder / SHARD).read_bytes()[start : start + container.payload_bytes]
    tables = {name: table.copy() for name, table in container.tables.items() if name != "padding"}
    metadata = dict(container.metadata)
    kind = mutate.random.choice(["payload", "payload", "payload", "table", "metadata", "model"])
    if kind == "payload":
        payload = mutate.bytes(payload)
    elif kind == "model" and "codec_model" in tables:
        tables["codec_model"] = np.frombuffer(mutate.bytes(tables["codec_model"].tobytes()), np.uint8)
    elif kind == "metadata":
        name = mutate.random.choice(sorted(metadata))
        metadata[name] = mutate.text(metadata[name])
    else:
        name = mutate.random.choice(sorted(tables))
        tables[name] = mutate.table(tables[name])
    index = tables["block_index"]
    if kind == "payload" and len(index) and index[-1, :2].sum() != len(payload):  # the last block takes what is left
        index[-1, 1] = max(0, len(payload) - index[-1, 0])
    if kind != "table":
        blocks = [payload[max(0, begin) : max(0, begin) + max(0, size)] for begin, size in index[:, :2].tolist()]
        tables["block_crc"] = np.array([crc32c(block) for block in blocks], np.uint32)
    before, after = pack(metadata, len(payload), tables)
    (folder / SHARD).write_bytes(before + payload + after)
    (folder / "manifest.json").unlink()


def header(mutate: Mutator, folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + length], data[8 + length : -8]
    if mutate.random.random() < 0.5:
        text = json.dumps(mutate.value(json.loads(text))).encode("utf-8", "surrogatepass")
    else:
        text = mutate.bytes(text)
    head = len(text).to_bytes(8, "little") + text
    payload = read_container(folder / SHARD).payload_bytes
    seal = np.array([crc32c(head), crc32c(body[payload:])], "<u4").tobytes()
    (folder / SHARD).write_bytes(head + body + seal)
    (folder / "manifest.json").unlink()


def index(mutate: Mutator, folder: Path) -> None:
    path = folder / "index.safetensors"
    container = read_container(path, INDEX_LAYOUT)
    tables = {name: container.tables[name].copy() for name in INDEX_LAYOUT if name != "seal"}
    name = mutate.random.choice(sorted(tables))
    tables[name] = mutate.table(tables[name])
    metadata = dict(container.metadata)
    if mutate.random.random() < 0.2:
        metadata["shards"] = mutate.text(metadata["shards"])
    path.write_bytes(b"".join(pack_sealed(metadata, tables, INDEX_LAYOUT)))


def manifest(mutate: Mutator, folder: Path) -> None:
    path = folder / "manifest.json"
    if mutate.random.random() < 0.7:
        path.write_text(json.dumps(mutate.value(json.loads(path.read_text()))))
    else:
        path.write_bytes(mutate.bytes(path.read_bytes()))


def asset(mutate: Mutator, folder: Path) -> None:
    for path in folder.glob("shapes-*"):
        path.write_bytes(mutate.bytes(path.read_bytes()))


def raw(mutate: Mutator, folder: Path) -> None:
    path = mutate.random.choice(sorted(folder.iterdir()))
    path.write_bytes(mutate.bytes(path.read_bytes()))


def read(folder: Path) -> bool:
    """Read a cache to its end. Returns whether it was accepted."""
    try:
        cache = kdfast.cache.open(folder)
        keys = list(cache)
        labels = [cache.gather(keys), *(cache[key] for key in keys[:3])]
        repr((cache, cache.info))
    except CacheError:
        return False
    config = cache.info.config
    for part in labels:
        if wrong := violation(part, "draws" in config):
            raise AssertionError(wrong)
    try:
        cache.verify()
    except CacheError:
        return False
    return True


# ---- a writer that resumes ------------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {"vocab_size": 11, "codec": "topk", "k": 3, "teacher": "t", "block_rows": 4}


def logits(seed: int) -> torch.Tensor:
    return torch.randn(2, 11, generator=torch.Generator().manual_seed(seed))


def leave(folder: Path) -> None:
    """What a writer leaves that an exception has ended: a part and a journal with parked records."""
    try:
        with kdfast.cache.Writer(folder, **OPTIONS) as writer:
            for key in range(7):
                writer.add(key, logits(key), targets=torch.tensor([1, -1]))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def journal(mutate: Mutator, folder: Path) -> None:
    """Entries changed, with checksums that are right again, or the part."""
    (path,) = folder.glob("*.journal")
    if mutate.random.random() < 0.3:
        (part,) = folder.glob("*.part")
        part.write_bytes(mutate.bytes(part.read_bytes()))
        return
    data, entries, at = path.read_bytes(), [], 0
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        entries.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    chosen = mutate.random.randrange(len(entries))
    entries[chosen] = mutate.bytes(entries[chosen])
    if mutate.random.random() < 0.2:
        mutate.random.shuffle(entries)
    out = b""
    for body in entries:
        prefix = len(body).to_bytes(4, "little")
        out += prefix + int(crc32c(prefix + body)).to_bytes(4, "little") + body
    path.write_bytes(out)


def resume(folder: Path) -> bool:
    try:
        with kdfast.cache.Writer(folder, **OPTIONS) as writer:
            if 100 not in writer:
                writer.add(100, logits(100), targets=torch.tensor([1, 2]))
    except CacheError:
        return False
    return read(folder)


Case = tuple[Callable[[Mutator, Path], None], Callable[[Path], bool]]
CASES: dict[str, Case] = {
    "shard": (shard, read),
    "header": (header, read),
    "index": (index, read),
    "manifest": (manifest, read),
    "asset": (asset, read),
    "raw": (raw, read),
    "journal": (journal, resume),
}
WEIGHTS = [10, 4, 2, 2, 1, 2, 2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first change; printed with failures")
    parser.add_argument("--only", choices=list(CASES), help="one kind of change")
    parser.add_argument("--json", type=Path, help="where to write the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    end = time.monotonic() + options.seconds
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        left = Path(name) / "left"
        leave(left)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))
        seed = options.seed
        while time.monotonic() < end:
            one(seed, options.only, Path(name), left, counts)
            seed += 1
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    print(f"seeds {options.seed} to {seed - 1}: {kinds}")
    if options.json:
        options.json.write_text(json.dumps({"executions": seed - options.seed, **counts}, indent=1))
    print(f"{seed - options.seed} executions, {counts['failures']} failures")
    return int(counts["failures"] > 0)


def one(seed: int, only: str | None, base: Path, left: Path, counts: Counter[str]) -> None:
    """One change, chosen by its seed, and what becomes of it."""
    mutate = Mutator(seed)
    kind = only or mutate.random.choices(list(CASES), WEIGHTS)[0]
    source = left if kind == "journal" else mutate.random.choice(sorted(V1.iterdir()))
    folder = base / "cache"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    (folder / "labels.safetensors").unlink(missing_ok=True)
    change, outcome = CASES[kind]
    try:
        change(mutate, folder)
        counts[f"{kind} accepted" if outcome(folder) else f"{kind} refused"] += 1
    except Exception:
        counts["failures"] += 1
        print(f"seed {seed}, {kind} of {source.name}:\n{traceback.format_exc(limit=-6)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
