"""The GPU benchmark: a case's contenders timed in turn, the device's two ceilings, and the results as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdfast.bench.gpu_cases import GpuCase
from kdfast.bench.gpu_contenders import contenders
from kdfast.bench.loss import gradient_errors
from kdfast.bench.report import markdown, save
from kdfast.bench.steps import Run

__all__ = [
    "COLUMNS",
    "Result",
    "ceilings",
    "cells",
    "copy_bandwidth",
    "gradient_errors_of",
    "interleaved_ms",
    "matmul_rate",
    "measure",
    "replay_ms",
    "save_gpu",
]

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU at hand


@dataclass(frozen=True)
class Result:
    """What one run has measured of a case.

    Attributes:
        name, rows, columns, dtype: the case's.
        ms: median milliseconds by contender.
        failed: the error of each contender that could not run.
        gb_s: ours, in GB/s of the fewest bytes that must be moved; 0 where memory is not the limit.
        peak_mib: MiB beyond the inputs, by contender.
        gradient_error: see ``gradient_errors_of``; empty where it was not measured.
    """

    name: str
    rows: int
    columns: int
    dtype: str
    ms: dict[str, float]
    failed: dict[str, str]
    gb_s: float
    peak_mib: dict[str, float]
    gradient_error: dict[str, float] = field(default_factory=dict)


def measure(case: GpuCase, repeats: int = 15) -> Result:
    """Time a case's contenders in turn, on the current CUDA device."""
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
    """Errors of the gradients of kdfast and of eager PyTorch against float64, relative to the largest gradient.

    They are of 16 rows with logits of standard deviation 1, 3 and 10.
    """
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


# ---- time: device events, contenders in turn, the L2 cache flushed before each, medians -----------------------------


def interleaved_ms(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each run by its name, after two rounds of warm-up."""
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 2):
        for name, run in runs.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
            if round_ > 1:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def replay_ms(run: Run, replays: int = 50) -> float:
    """Milliseconds of a step that is replayed as a CUDA graph: its latency without that of Python."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return interleaved_ms({"replay": graph.replay}, replays)["replay"]


def copy_bandwidth(repeats: int = 20) -> float:
    """GB/s, read and write, of a device-to-device copy of 2 GiB."""
    source = torch.randn(1 << 29, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    ms = interleaved_ms({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.numel() * source.element_size() / ms / 1e6


def matmul_rate(size: int = 8192, repeats: int = 10) -> float:
    """TFLOP/s of a bfloat16 matrix product of random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = interleaved_ms({"matmul": lambda: a @ b}, repeats)["matmul"]
    return 2 * size**3 / ms / 1e9


# ---- the results as JSON and as a table -----------------------------------------------------------------------------


COLUMNS = (
    "case",
    "dtype",
    "rows x V",
    "ours ms",
    "GB/s",
    "of copy",
    "M rows/s",
    "others, times as long",
    "MiB: ours / eager",
)


def ceilings() -> dict[str, Any]:
    """The device's name, and how fast it copies and multiplies."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "copy_gb_s": copy_bandwidth(),
        "bf16_tflop_s": matmul_rate(),
        "cuda": torch.version.cuda,
    }


def cells(result: Result, copy_gb_s: float) -> tuple[str, ...]:
    """The table's row of a result, in the order of ``COLUMNS``; other contenders' times are divided by ours."""
    ours = result.ms.get("ours", float("nan"))
    others = [f"{name} {ms / ours:.1f}" for name, ms in result.ms.items() if name != "ours"]
    others += [f"{name} failed" for name in result.failed]
    return (
        result.name,
        result.dtype,
        f"{result.rows} x {result.columns}",
        f"{ours:.3f}",
        f"{result.gb_s:,.0f}" if result.gb_s else "",
        f"{result.gb_s / copy_gb_s:.0%}" if result.gb_s else "",
        f"{result.rows / ours / 1e3:.2f}",
        ", ".join(others),
        " / ".join(f"{result.peak_mib[name]:,.0f}" for name in ("ours", "eager") if name in result.peak_mib),
    )


def save_gpu(results: list[Result], machine: dict[str, Any], checks: dict[str, str], folder: Path) -> Path:
    """Write ``gpu-<date>.json`` and the same as Markdown, and return the JSON's path.

    Call it after every case, so that a run that is cut short has left its results.
    """
    lines = [
        markdown(COLUMNS, (cells(result, machine["copy_gb_s"]) for result in results)),
        "`GB/s`: the fewest bytes that a case must move over our time; `of copy`: of the copy bandwidth in that run.",
        *(
            f"{result.name}, {result.dtype}: gradient error against float64 " + _errors(result)
            for result in results
            if result.gradient_error
        ),
        *(f"{result.name}: {name} failed: {why}" for result in results for name, why in result.failed.items()),
        *(f"{name}: {text}" for name, text in checks.items()),
    ]
    document = {"checks": checks, "results": [asdict(result) for result in results]}
    return save("gpu", folder, document, "\n\n".join(lines), machine)


def _errors(result: Result) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in result.gradient_error.items())
