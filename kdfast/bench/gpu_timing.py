"""Time on a GPU: device events, contenders in turn, the L2 cache flushed before each, medians. And its two ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

__all__ = ["copy_bandwidth", "interleaved_ms", "matmul_rate", "replay_ms"]

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU at hand

Run = Callable[[], object]


def interleaved_ms(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, after two rounds that warm up."""
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
    """Milliseconds of a step that is captured as a CUDA graph: its latency without Python's."""
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
