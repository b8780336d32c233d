"""Every bit and every truncation of golden caches: python tests/trust/bits.py [--seconds 60]

One bit of a shard, an index, a manifest or a table of prototypes is flipped, or the file is cut short. That must be
detected, by opening, reading or verifying, or be harmless: all labels as they were. Without ``--seconds`` all of them
are tried (some hours); with it, as many as there is time for, drawn at random.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

import kdfast.cache
from kdfast.cache import CacheError
from kdfast.labels import SoftLabels
from laws import same

V1 = Path(__file__).resolve().parents[1] / "fixtures" / "v1"


def changes(size: int) -> Iterator[int]:
    """Each bit by its number, and each truncation by the length that stays, as -1 - length."""
    yield from range(8 * size)
    yield from range(-size, 0)


def outcome(folder: Path, want: SoftLabels) -> str:
    try:
        cache = kdfast.cache.open(folder)
        labels = cache.gather(range(len(cache)))
    except (CacheError, KeyError) as error:
        return "detected" if isinstance(error, CacheError) else f"failure: {error!r}"
    if not same(labels, want):
        return "failure: other labels"
    try:
        cache.verify()
    except CacheError:
        return "detected by verify"
    return "harmless"


def files(names: list[str]) -> Iterator[tuple[Path, SoftLabels]]:
    for name in names:
        cache = kdfast.cache.open(V1 / name)
        want = cache.gather(range(len(cache)))
        for path in sorted((V1 / name).iterdir()):
            if path.name != "labels.safetensors":
                yield path, want


def try_one(folder: Path, source: Path, want: SoftLabels, change: int) -> str:
    data = bytearray(source.read_bytes())
    if change < 0:
        del data[len(data) + change :]
    else:
        data[change // 8] ^= 1 << change % 8
    (folder / source.name).write_bytes(data)
    try:
        return outcome(folder, want)
    except Exception as error:
        return f"failure: {error!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=0, help="0: all of them")
    parser.add_argument("--only", help="one golden cache, by its name")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--json", type=Path, help="where to write the counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    chosen = [(path, want) for path, want in files([options.only] if options.only else sorted(os.listdir(V1)))]
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as name:
        for path, want, change in _plan(chosen, options.seconds, options.seed):
            folder = Path(name) / path.parent.name
            if not folder.exists():
                shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns("labels.safetensors"))
            found = try_one(folder, path, want, change)
            counts[found.partition(":")[0]] += 1
            if found.startswith("failure"):
                print(f"{path.parent.name}/{path.name}, change {change}: {found}", file=sys.stderr, flush=True)
            shutil.copy(path, folder / path.name)
    total = sum(counts.values())
    print(", ".join(f"{kind} {count}" for kind, count in sorted(counts.items())))
    if options.json:
        options.json.write_text(json.dumps({"executions": total, **counts}, indent=1))
    print(f"{total} executions, {counts['failure']} failures")
    return int(counts["failure"] > 0 or not total)


def _plan(chosen: list[tuple[Path, SoftLabels]], seconds: int, seed: int) -> Iterator[tuple[Path, SoftLabels, int]]:
    if not seconds:
        for path, want in chosen:
            for change in changes(path.stat().st_size):
                yield path, want, change
        return
    draw, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        path, want = draw.choice(chosen)
        size = path.stat().st_size
        yield path, want, draw.randrange(-size, 8 * size)


if __name__ == "__main__":
    sys.exit(main())
