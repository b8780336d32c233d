"""Codecs and children that the writer's tests share."""

import re
import zlib

import numpy as np
import torch

import kdfast.cache
from kdfast.cache import codecs
from kdfast.cache.codecs import Codec
from kdfast.cache.format.view import View
from kdfast.labels import SoftLabels

VOCAB = 11
LEFTOVER = re.compile(r".*\.\d+-[0-9a-f]{8}\.part")


def logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def writer(path, **options):
    return kdfast.cache.Writer(path, **{"vocab_size": VOCAB, "codec": "topk", "k": 4, "teacher": "t", **options})


@codecs.register
class Toy(Codec):
    """Rows less a mean that it learns, and an asset, in blocks of any length."""

    name = "toy"
    kind = "dense"

    def __init__(self, vocab_size, temperatures, *, learn_rows=0, table=""):
        super().__init__(vocab_size, temperatures)
        self.learn_rows, self.table = learn_rows, table

    def config(self):
        return {"learn_rows": self.learn_rows, "table": self.table}

    def assets(self):
        return {"toy-table.bin": self.table.encode()} if self.table else {}

    def learn(self, labels):
        return labels.values.sum(0).numpy().tobytes()

    def use_model(self, model):
        self.model = model

    def select(self, logits, key):
        return SoftLabels.dense(logits.float())

    def encode(self, labels):
        assert self.model or not self.learn_rows
        return zlib.compress(self.model[:1] + labels.values.numpy().tobytes())

    def decode(self, data, units, wanted):
        parts = [zlib.decompress(data[begin : begin + length]) for begin, length, _ in units.tolist()]
        rows = np.frombuffer(b"".join(part[len(part) % 4 :] for part in parts), "<f4").reshape(-1, self.vocab_size)
        return SoftLabels.dense(torch.from_numpy(rows[wanted]))


def record(i):
    """The i-th record: 0 ... 5 rows, with everything a record can have."""
    rows = i * 7 % 6
    targets = torch.arange(rows) * i % (VOCAB + 1) - 1
    views = [View(crop=(0.1, 0.2, i / 1000, 0.5) if i % 3 else None, flip=i % 2 == 0, seed=i) for _ in range(rows)]
    return i, logits(rows, seed=i), {"targets": targets, "views": views}


def write(path, records, codec="topk", announce=lambda count: None, **options):
    """Add ``record(i)`` for each i of ``records`` that is not there yet."""
    defaults = {"vocab_size": VOCAB, "teacher": "t", "block_rows": 8, "shard_bytes": 1500}
    defaults |= {"k": 4} if codec == "topk" else {"learn_rows": 50, "table": "abc"}
    with kdfast.cache.Writer(path, codec=codec, **{**defaults, **options}) as writer:
        for i in records:
            if i not in writer:
                key, rows, extras = record(i)
                writer.add(key, rows, **extras)
            announce(i)


def contents(path):
    """Every file's bytes by name, but for what a kill left of a file that was being published."""
    return {p.name: p.read_bytes() for p in path.iterdir() if not LEFTOVER.fullmatch(p.name)}
