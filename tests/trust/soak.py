"""A soak test: captures, readers and training side by side, for as long as is asked; nothing may grow.

    python tests/trust/soak.py --seconds 1800 [--json FILE]

One thread captures caches, one reads those that are finished and compares every label with its first reading, one
trains from them with checkpoints, a loader's workers read as well. Every few seconds the resident memory, the open
descriptors, the threads and the work done are sampled. Memory and descriptors of the last third must not exceed those
of the third before; throughput is reported. The last line says what was done. Exit code 1: growth, or a label differed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import kdfast
import kdfast.cache
from kdfast.labels.packed import unpacked

VOCAB, LENGTH, RECORDS, BATCH = 512, 24, 96, 8
CODECS: tuple[dict[str, Any], ...] = (
    {"codec": "topk", "k": 8},
    {"codec": "sample", "draws": 20},
    {"codec": "threshold", "tau": 0.05},
    {"codec": "prototype", "k": 3, "prototypes": 8},
    {"codec": "dense"},
)
# What a process may take more in the last third: allocators keep some, and threads hold different work when sampled.
SLACK_MIB, SLACK_DESCRIPTORS = 48, 8
WARM_S, SLACK_COLD_MIB = 300.0, 256  # a shorter run's threads have not all begun in its first third


class LM(nn.Module):
    """A causal model of one token of context."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids))


class Soak:
    """The threads' common state: caches that are finished, what was done, and what went wrong."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done, self.faults = folder, Counter(), []
        self.finished: list[Path] = []
        self.readers: Counter[Path | None] = Counter()
        self.lock, self.stop = threading.Lock(), threading.Event()

    def run(self, name: str, work: Any) -> threading.Thread:
        """A thread that works until it is told to stop; an exception is a fault, and stops all."""

        def loop() -> None:
            number = 0
            while not self.stop.is_set():
                try:
                    work(number)
                except Exception as error:
                    self.faults.append(f"{name}: {type(error).__name__}: {error}")
                    self.stop.set()
                number += 1

        thread = threading.Thread(target=loop, name=name)
        thread.start()
        return thread

    def capture(self, number: int) -> None:
        """One cache of new texts, with the next codec; of finished ones the four newest are kept."""
        texts = torch.randint(0, VOCAB, (RECORDS, LENGTH), generator=torch.Generator().manual_seed(number))
        torch.manual_seed(number)
        path = self.folder / f"cache-{number}"
        options = CODECS[number % len(CODECS)]
        loader = [{"input_ids": texts[i : i + BATCH]} for i in range(0, RECORDS, BATCH)]
        kdfast.cache.capture(LM(), loader, path, vocab_size=VOCAB, shard_bytes=20_000, progress=False, **options)
        with self.lock:
            self.finished.append(path)
            old = [x for x in self.finished[:-4] if not self.readers[x]]
            self.finished = [x for x in self.finished if x not in old]
        for directory in old:
            shutil.rmtree(directory)
        self.done["captured"] += RECORDS

    @contextmanager
    def newest(self) -> Iterator[tuple[kdfast.cache.CacheReader, torch.Tensor] | None]:
        """The newest finished cache, which nobody deletes meanwhile, and the texts that it was captured from."""
        with self.lock:
            path = self.finished[-1] if self.finished else None
            self.readers[path] += 1
        try:
            if path is None:
                self.stop.wait(0.05)
                yield None
            else:
                number = int(path.name.split("-")[1])
                texts = torch.randint(0, VOCAB, (RECORDS, LENGTH), generator=torch.Generator().manual_seed(number))
                yield kdfast.cache.open(path), texts
        finally:
            with self.lock:
                self.readers[path] -= 1

    def read(self, number: int) -> None:
        """Labels of all records one by one, and again in any order and together: they are the same bits."""
        with self.newest() as found:
            if found is None:
                return
            cache, texts = found
            first = [cache[text] for text in texts]
            order = torch.randperm(RECORDS, generator=torch.Generator().manual_seed(number))[:32].tolist()
            together = unpacked(cache.gather([texts[i] for i in order]))
            for place, i in enumerate(order):
                part = together[place * LENGTH : (place + 1) * LENGTH]
                if not torch.equal(part.values, first[i].values):
                    raise AssertionError(f"record {i} differs when gathered")
            if number % 8 == 0:
                cache.verify()
                dataset = kdfast.cache.CacheDataset(cache, list(texts))
                loader = DataLoader(dataset, batch_size=None, num_workers=1, timeout=300)
                self.done["read"] += sum(1 for _ in loader)
            self.done["read"] += RECORDS + len(order)

    def train(self, number: int) -> None:
        """An epoch with checkpoints in a folder of its own."""
        with self.newest() as found:
            if found is None:
                return
            cache, texts = found
            options: dict[str, Any] = {"divergence": "soft_ce", "temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0}
            folder = self.folder / "run"
            student = kdfast.Distiller(LM(), cache, folder=folder, **options)
            batches = [{"input_ids": texts[i : i + BATCH]} for i in range(0, RECORDS, BATCH)]
            student.fit(batches, epochs=1)
            shutil.rmtree(folder)
            self.done["trained"] += RECORDS


def sample(soak: Soak) -> dict[str, float]:
    """What the process holds now, and what has been done."""
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    resident = int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    held = {"MiB": resident, "descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}
    return {"time": time.monotonic(), **held, **soak.done}


def judge(samples: list[dict[str, float]], seconds: float) -> list[str]:
    """What grew from the second third of the samples to the last."""
    third = len(samples) // 3
    before, after = samples[third : 2 * third], samples[2 * third :]
    faults, memory = [], SLACK_MIB if seconds >= WARM_S else SLACK_COLD_MIB
    for name, slack in (("MiB", memory), ("descriptors", SLACK_DESCRIPTORS)):
        was, now = (statistics.median(s[name] for s in part) for part in (before, after))
        if now > was + slack:
            faults.append(f"{name} grew from {was:.0f} to {now:.0f}")
    return faults


def rates(samples: list[dict[str, float]]) -> dict[str, list[float]]:
    """Records a second in each third."""
    third = len(samples) // 3
    parts = [samples[:third], samples[third : 2 * third], samples[2 * third :]]
    return {
        name: [
            round((part[-1].get(name, 0) - part[0].get(name, 0)) / max(part[-1]["time"] - part[0]["time"], 1e-9), 1)
            for part in parts
        ]
        for name in ("captured", "read", "trained")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--json", type=Path, help="write the samples there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        threads = [soak.run(name, getattr(soak, name)) for name in ("capture", "read", "train")]
        samples, end = [], time.monotonic() + args.seconds
        while time.monotonic() < end and not soak.stop.is_set():
            soak.stop.wait(max(args.seconds / 60, 0.5))
            samples.append(sample(soak))
        soak.stop.set()
        for thread in threads:
            thread.join()
    if soak.faults:
        raise SystemExit("\n".join(soak.faults))
    faults = judge(samples, args.seconds)
    if args.json is not None:
        args.json.write_text(json.dumps({"samples": samples, "rates": rates(samples), "faults": faults}, indent=1))
    for fault in faults:
        print(fault)
    last = samples[-1]
    print(f"records a second in each third: {rates(samples)}")
    print(
        f"{args.seconds:.0f} s: {dict(soak.done)} records, {last['MiB']:.0f} MiB, {last['descriptors']:.0f} "
        f"descriptors at the end, {len(faults)} failures"
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
