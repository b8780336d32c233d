"""The arithmetic of docs/scale.md, and small caches and process groups that check it by counting.

python benchmarks/scale.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import kdfast.cache
from kdfast import Head, SoftLabels, kd_loss

RESULTS = Path(__file__).parent / "results"
# The default codec, by its names in the cache benchmark's results.
CODEC = "prototype-3, 256 prototypes", "prototype-3, 256 shapes"


@dataclass(frozen=True)
class Plan:
    """A training run larger than any measured here. Rates are the vendor's, times the share that training reaches."""

    tokens: float = 100e9
    vocab: int = 128_256
    window: int = 4096
    teacher: float = 70e9  # parameters
    student: float = 8e9
    width: int = 4096  # of the student's hidden states
    capture_gpus: int = 512
    ranks: int = 256  # that train the student
    step_tokens: int = 4 << 20  # of all ranks
    flop_s: float = 0.4 * 989e12  # H200, dense bfloat16


def main() -> None:
    for line in (*arithmetic(Plan(), measured()), "", *counted()):
        print(line)


def measured() -> dict[str, float]:
    """Bytes per token, and tokens/s that one core decodes, from the newest results of the cache benchmark."""
    newest = max(RESULTS.glob("cache-cpu-*.json"))
    row = next(row for row in json.loads(newest.read_text())["results"] if row["name"] in CODEC)
    return {"bytes": row["file_bytes"], "fixed": row["fixed_bytes"], "decode": row["speed"]["decode"]}


def arithmetic(plan: Plan, cache: dict[str, float]) -> Iterator[str]:
    """Lines with what a plan stores, reads and sends, and how long each of these takes."""
    rank_tokens = plan.step_tokens // plan.ranks
    records = plan.tokens / plan.window
    per_gpu = plan.flop_s / (2 * plan.teacher)
    student = 6 * plan.student * rank_tokens / plan.flop_s
    head = 3 * 2 * plan.vocab * plan.width * rank_tokens / plan.flop_s
    live = 2 * plan.teacher * rank_tokens / plan.flop_s
    rows = {
        "stored: labels": f"{plan.tokens * cache['bytes'] / 1e9:,.0f} GB ({cache['bytes']:.1f} B a token)",
        "stored: index": f"{records * INDEX_BYTES / 1e9:.2f} GB ({records / 1e6:.1f} M windows)",
        "stored: prototypes": f"{cache['fixed'] * plan.vocab / 49_152 / 1e6:.0f} MB",
        "the same in bfloat16 logits": f"{plan.tokens * plan.vocab * 2 / 1e15:,.1f} PB",
        "the same at Megatron's 320 B": f"{plan.tokens * 320 / 1e12:,.0f} TB",
        "capture: a GPU": f"{per_gpu:,.0f} tokens/s; {plan.tokens / per_gpu / 3600:,.0f} GPU hours",
        "capture: all GPUs": f"{plan.tokens / per_gpu / plan.capture_gpus / 3600:.0f} h, "
        f"{per_gpu * plan.capture_gpus * cache['bytes'] / 1e6:.1f} MB/s written",
        "a step: read": f"{plan.step_tokens * cache['bytes'] / 1e6:.1f} MB, "
        f"{rank_tokens * cache['bytes'] / 1e3:.0f} kB a rank",
        "a step: decoded": f"{rank_tokens / cache['decode'] * 1e3:.1f} ms of one core a rank",
        "a step: student": f"{student * 1e3:,.0f} ms and {head * 1e3:.0f} ms for its head",
        "a step: gradients": f"{2 * 2 * plan.student / 1e9:.0f} GB a rank, sent and received",
        "a step: logits": f"{rank_tokens * plan.vocab * 4 / 1e9:.1f} GB a rank in float32, .5 GB with a Head",
        "a step: a teacher instead": f"{live * 1e3:,.0f} ms, {live / (student + head):.1f} times the student's own",
    }
    yield from (f"{name:30}{text}" for name, text in rows.items())


# ---- counting -------------------------------------------------------------------------------------------------------

VOCAB, ROWS = 4096, (8192, 32_768)
INDEX_BYTES = 16  # of a window, in index.safetensors: a prefix of its key, and where it is
RANKS, STEP = 4, 16_384  # and rows that all of them see in a step


def counted() -> Iterator[str]:
    """Lines that check the assumptions: bytes grow with the tokens alone, and each rank reads only its own."""
    with tempfile.TemporaryDirectory() as folder:
        for rows in ROWS:
            info = _cache(Path(folder) / f"of-{rows}", rows, 1024).info
            yield (
                f"{info.rows:,} rows: {info.payload_bytes / info.rows:.2f} B of labels a row, files "
                f"{info.file_bytes / info.rows:.2f}, index {info.index_bytes / info.records:.0f} B a window"
            )
        for window in (256, 1024, 4096):
            yield _read(_cache(Path(folder) / f"by-{window}", ROWS[1], window), window)
    for name in ("logits", "topk"):
        yield f"a vocabulary's shards, {name}: " + ", ".join(_sent(name, columns) for columns in (1000, 32_000))


def _cache(path: Path, rows: int, window: int) -> kdfast.cache.CacheReader:
    """A cache of random logits that are distributed as words' are."""
    generator = torch.Generator().manual_seed(0)
    common = -1.2 * torch.arange(1, VOCAB + 1).log()
    typical = (torch.randn(8, VOCAB, generator=generator) + common).softmax(-1)
    prototypes = kdfast.cache.PrototypeTable.of(typical, typical)
    with kdfast.cache.Writer(
        path, vocab_size=VOCAB, codec="prototype", k=3, prototypes=prototypes, teacher="none"
    ) as writer:
        for start in range(0, rows, window):
            writer.add(f"window {start}", torch.randn(window, VOCAB, generator=generator) + common)
    return kdfast.cache.open(path)


def _read(cache: kdfast.cache.CacheReader, window: int) -> str:
    """The compressed bytes that ranks read in a shuffled epoch, as shares of those that are stored."""
    data = kdfast.cache.CacheDataset(cache, [f"window {start}" for start in range(0, ROWS[1], window)])
    asked = []
    for rank in range(RANKS):
        sampler = kdfast.cache.ElasticSampler(len(data), STEP // window, seed=0, rank=rank, world_size=RANKS)
        asked.append(sum(data.collate([data[i] for i in batch])[1].data.numel() for batch in sampler))
    stored = cache.info.payload_bytes
    share = ", ".join(f"{number / stored:.2f}" for number in asked)
    return f"windows of {window:,}: {RANKS} ranks read {share} of the stored bytes, {sum(asked) / stored:.2f} in all"


def _sent(name: str, columns: int, rows: int = 8) -> str:
    """The bytes that a process sends for a loss and the weight's gradient, without the hidden states' gradient."""
    hidden, weight = torch.randn(rows, 8), torch.randn(columns, 8, requires_grad=True)
    teacher = torch.randn(rows, columns)
    top, ids = teacher.log_softmax(-1).topk(16)
    tail = torch.log1p(-top.exp().sum(-1))[None]
    given = teacher if name == "logits" else SoftLabels.topk(ids, top, tail, vocab_size=columns)
    sent = []
    reduce = dist.all_reduce

    def counting(x: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(x.numel() * x.element_size())
        return reduce(x, *arguments, **options)

    with mock.patch.object(dist, "all_reduce", counting):
        kd_loss(Head(hidden, weight), given, torch.arange(rows), ce_weight=1.0, group=dist.group.WORLD)
    return f"{columns:,} columns {sum(sent) / rows:,.0f} B a row"


if __name__ == "__main__":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    main()
    dist.destroy_process_group()
