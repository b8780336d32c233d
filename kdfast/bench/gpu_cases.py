"""What is timed on a GPU: losses forward and backward, capture, decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from kdfast.bench.loss import CASES as CPU_CASES
from kdfast.bench.loss import Case

__all__ = ["CASES", "SHAPES", "GpuCase"]

SHAPES = [(8192, 32000), (8192, 50257), (8192, 128256), (8192, 151936), (8192, 262144)]


@dataclass(frozen=True)
class GpuCase:
    """What is timed in one line of the table.

    Attributes:
        name: in the table.
        rows, columns: of the logits.
        dtype: of the logits.
        kind: dense, sparse, head, capture, decode or graph.
        bytes: per column of a row that a perfect implementation moves through memory; 0 where memory is not the limit.
        case: the loss, of the kinds dense and graph.
        compile: whether torch.compile is among the contenders; compiling takes many seconds.
        others: other kernels of ours that are timed, by the names that KDFAST_GPU takes.
        width: of the hidden states, of the kind head.
    """

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    kind: str
    bytes: float
    case: Case = field(default_factory=lambda: CPU_CASES["kl"])
    compile: bool = False
    others: tuple[str, ...] = ()
    width: int = 0


def _cases() -> Iterator[GpuCase]:
    bf16 = torch.bfloat16
    for rows, columns in SHAPES:
        others = ("triton", "once") if columns % 8 == 0 else ("triton",)
        yield GpuCase("kl-tau2", rows, columns, bf16, "dense", 6, compile=columns == 128256, others=others)
    for name, case in {
        "kl-tau1": Case("forward_kl", 1.0),
        "kl-tau3.3": Case("forward_kl", 3.3),
        "kl-row-tau": Case("forward_kl", None),
        "kl-inplace": Case("forward_kl", 2.0, "inplace"),
        "rkl": Case("reverse_kl", 2.0),
        "jsd": Case("jsd", 2.0),
    }.items():
        yield GpuCase(name, 8192, 128256, bf16, "dense", 6, case, compile=name == "jsd", others=("triton",))
    yield GpuCase("kl-tau2", 8192, 128256, torch.float32, "dense", 12)
    for rows, columns in ((8192, 32000), (8192, 128256), (8192, 262144)):
        yield GpuCase("sparse-k64", rows, columns, bf16, "sparse", 4, compile=columns == 128256, others=("triton",))
    yield GpuCase("threshold-.02", 2048, 128256, bf16, "capture", 2)
    yield GpuCase("decode-blocks", 1 << 16, 50257, torch.int32, "decode", 0)
    yield GpuCase("decode-plain", 1 << 16, 50257, torch.int32, "decode", 0)
    yield GpuCase("head-soft-ce", 4096, 128256, bf16, "head", 0, width=2048)
    for rows, teacher in ((8192, "head"), (8192, "topk"), (512, "head"), (512, "topk")):
        yield GpuCase(f"head-{teacher}", rows, 128256, bf16, "head", 0, compile=rows == 8192, width=4096)
    for rows, columns in ((8, 128256), (64, 32000)):
        yield GpuCase("kl-graph", rows, columns, bf16, "graph", 6)


CASES = list(_cases())
