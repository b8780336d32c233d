"""What is timed on a GPU: losses forward and backward, capture, decoding; each against who else can do it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from kdfast.bench.gpu_contenders import contenders
from kdfast.bench.gpu_timing import interleaved_ms, replay_ms
from kdfast.bench.loss import CASES as CPU_CASES
from kdfast.bench.loss import Case, gradient_errors

__all__ = ["CASES", "SHAPES", "GpuCase", "Result", "gradient_errors_of", "measure"]

SHAPES = [(8192, 32000), (8192, 50257), (8192, 128256), (8192, 151936), (8192, 262144)]


@dataclass(frozen=True)
class GpuCase:
    """One line of the table.

    ``bytes``: per column of a row that a perfect implementation moves through memory; 0 where that is not what limits
    it. ``compile``: whether torch.compile is among the contenders, which takes it many seconds. ``others``: what else
    of ours KDFAST_GPU can name. ``width``: of the hidden states before a head.
    """

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    kind: str  # dense, sparse, head, capture, decode, graph
    bytes: float
    case: Case = field(default_factory=lambda: CPU_CASES["kl"])
    compile: bool = False
    others: tuple[str, ...] = ()
    width: int = 0


@dataclass(frozen=True)
class Result:
    """Median milliseconds of each contender, in one run; one that failed says why instead."""

    name: str
    rows: int
    columns: int
    dtype: str
    ms: dict[str, float]
    failed: dict[str, str]
    gb_s: float  # of ours, at the fewest bytes; 0 where they are not what counts
    peak_mib: dict[str, float]  # beyond the inputs
    gradient_error: dict[str, float] = field(default_factory=dict)


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


def measure(case: GpuCase, repeats: int = 15) -> Result:
    """Times a case's contenders in turn."""
    torch.cuda.empty_cache()
    runs, failed, peak = {}, {}, {}
    for name, make in contenders(case, "cuda").items():
        try:
            run = make()
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peak[name] = (torch.cuda.max_memory_allocated() - base) / 2**20
            runs[name] = run
        except Exception as error:  # a contender that cannot: the others are timed
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    graph = case.kind == "graph"
    ms = {name: replay_ms(run) for name, run in runs.items()} if graph else interleaved_ms(runs, repeats)
    gb_s = case.bytes * case.rows * case.columns / ms["ours"] / 1e6 if "ours" in ms else 0.0
    errors = gradient_errors_of(case, "cuda") if case.kind == "dense" and case.columns == 128256 else {}
    return Result(
        case.name, case.rows, case.columns, str(case.dtype).removeprefix("torch."), ms, failed, gb_s, peak, errors
    )


def gradient_errors_of(case: GpuCase, device: str) -> dict[str, float]:
    """Against float64, of a few rows, at logits of standard deviation 1, 3 and 10."""
    errors: dict[str, float] = {}
    for scale in (1, 3, 10):
        generator = torch.Generator(device).manual_seed(scale)
        shape = 16, case.columns
        s, t = (torch.randn(shape, dtype=case.dtype, generator=generator, device=device).mul_(scale) for _ in range(2))
        y = torch.randint(case.columns, (16,), generator=generator, device=device)
        tau = case.case.temperature or torch.linspace(1.5, 2.5, 16, device=device)
        found = gradient_errors(case.case, s, t, y, tau)
        errors |= {f"{name}, std {scale}": error for name, error in found.items()}
    return errors
