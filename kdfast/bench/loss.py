"""The loss benchmark: dense losses, forward + backward, against eager PyTorch and torch.compile in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import kd_loss
from kdfast.bench.report import markdown, save
from kdfast.bench.steps import median_ms, seconds_of
from kdfast.testing import relative_error

__all__ = [
    "CASES",
    "COLUMNS",
    "DTYPES",
    "SHAPES",
    "Case",
    "Loss",
    "Measurement",
    "cells",
    "contenders",
    "eager",
    "gradient_errors",
    "measure",
    "ours",
    "save_loss",
]

SHAPES = [(8192, 1000), (512, 32000), (128, 128256)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """The loss that is timed: cross-entropy plus a divergence.

    Attributes:
        divergence: its name, as ``kd_loss`` takes it.
        temperature: of the divergence; None for one per row.
        backward: as ``kd_loss`` takes it.
    """

    divergence: str
    temperature: float | None
    backward: str = "fused"


CASES = {
    "kl": Case("forward_kl", 2.0),
    "kl-inplace": Case("forward_kl", 2.0, "inplace"),
    "kl-tau3.3": Case("forward_kl", 3.3),
    "kl-row-tau": Case("forward_kl", None),
    "rkl": Case("reverse_kl", 2.0),
    "jsd": Case("jsd", 2.0),
}


@dataclass(frozen=True)
class Measurement:
    """The times and the accuracy of one case at one shape, from one run.

    Attributes:
        case: its name in ``CASES``.
        dtype: its name in ``DTYPES``.
        rows, columns: of the logits.
        ms: median milliseconds of ours, eager, compile and copy.
        gradient_error: max |grad - grad64| / max |grad64| of ours and eager.
        copy_gb_s: the copy's GB/s, read and written.
        share_of_copy: ours over that, at 3 elements per column: read student, read teacher, write gradient.
    """

    case: str
    dtype: str
    rows: int
    columns: int
    ms: dict[str, float]
    gradient_error: dict[str, float]
    copy_gb_s: float
    share_of_copy: float

    @property
    def ratios(self) -> dict[str, float]:
        """The times of eager PyTorch and torch.compile over ours."""
        return {name: self.ms[name] / self.ms["ours"] for name in ("eager", "compile")}


def measure(name: str, dtype: str, rows: int, columns: int, repeats: int = 11) -> Measurement:
    """Time every contender in turn, for ``repeats`` rounds after one of warm-up."""
    case, element = CASES[name], DTYPES[dtype]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, columns, generator=generator).mul_(3).to(element) for _ in range(2))
    labels = torch.randint(0, columns, (rows,), generator=generator)
    tau = torch.rand(rows, generator=generator) + 1.5 if case.temperature is None else case.temperature
    runs = contenders(case, student, teacher, labels, tau)
    ms = median_ms(runs, repeats)
    bytes_moved = student.numel() * student.element_size()
    copy_gb_s = 2 * bytes_moved / ms["copy"] / 1e6
    return Measurement(
        case=name,
        dtype=dtype,
        rows=rows,
        columns=columns,
        ms=ms,
        gradient_error=gradient_errors(
            case, student[:8], teacher[:8], labels[:8], tau[:8] if isinstance(tau, Tensor) else tau
        ),
        copy_gb_s=copy_gb_s,
        share_of_copy=3 * bytes_moved / ms["ours"] / 1e6 / copy_gb_s,
    )


Loss = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def contenders(
    case: Case, student: Tensor, teacher: Tensor, labels: Tensor, tau: Any
) -> dict[str, Callable[[], float]]:
    """Functions by contender, each of which runs one forward + backward, or one copy, and returns its seconds."""
    leaf = student.clone().requires_grad_()
    target = student.clone()
    torch.compiler.reset()

    def timed(loss: Loss) -> Callable[[], float]:
        def run() -> float:
            leaf.grad = None
            start = time.perf_counter()
            loss(leaf, teacher, labels, tau).backward()  # type: ignore[no-untyped-call]
            return time.perf_counter() - start

        return run

    def inplace() -> float:
        # The logits that a head has just computed; making them is not part of the loss.
        logits = leaf * 1
        start = time.perf_counter()
        loss = ours(case)(logits, teacher, labels, tau)
        torch.autograd.grad(loss, logits)
        return time.perf_counter() - start

    def copy() -> float:
        return seconds_of(lambda: target.copy_(teacher))

    fused = inplace if case.backward == "inplace" else timed(ours(case))
    compiled = torch.compile(eager(case))
    return {"ours": fused, "eager": timed(eager(case)), "compile": timed(compiled), "copy": copy}


def ours(case: Case) -> Loss:
    """Cross-entropy + divergence by ``kd_loss``."""

    def loss(s: Tensor, t: Tensor, y: Tensor, tau: Any) -> Tensor:
        return kd_loss(  # type: ignore[no-any-return]
            s, t, y, divergence=case.divergence, temperature=tau, ce_weight=1.0, backward=case.backward
        )

    return loss


def eager(case: Case) -> Loss:
    """Cross-entropy + divergence in eager PyTorch, in the logits' dtype, as they are usually written."""
    divergence = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}[case.divergence]

    def loss(s: Tensor, t: Tensor, y: Tensor, tau: Any) -> Tensor:
        scale = tau[:, None].to(s.dtype) if isinstance(tau, Tensor) else tau
        kd = divergence(F.log_softmax(s / scale, -1), F.log_softmax(t / scale, -1))
        return F.cross_entropy(s, y) + (tau**2 * kd).mean()

    return loss


def _forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)


def _jsd(log_q: Tensor, log_p: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    return 0.5 * (_forward_kl(log_m, log_p) + _forward_kl(log_m, log_q))


def gradient_errors(case: Case, student: Tensor, teacher: Tensor, labels: Tensor, tau: Any) -> dict[str, float]:
    """Errors of the gradients of ours and of eager PyTorch against eager PyTorch in float64."""

    def gradient(loss: Loss, *logits: Tensor) -> Tensor:
        leaf = logits[0].clone().requires_grad_()
        return torch.autograd.grad(loss(leaf * 1, logits[1], labels, tau), leaf)[0]

    wide = tau.double() if isinstance(tau, Tensor) else tau
    leaf = student.double().requires_grad_()
    (exact,) = torch.autograd.grad(eager(case)(leaf, teacher.double(), labels, wide), leaf)
    return {
        "ours": relative_error(gradient(ours(case), student, teacher), exact),
        "eager": relative_error(gradient(eager(case), student, teacher), exact),
    }


# ---- the table ------------------------------------------------------------------------------------------------------


COLUMNS = ("case", "dtype", "rows x V", "ours ms", "eager", "torch.compile", "share of copy", "grad error ours / eager")


def cells(r: Measurement) -> tuple[str, ...]:
    """The table's row of a measurement, in the order of ``COLUMNS``; other contenders' times are divided by ours."""
    return (
        r.case,
        r.dtype,
        f"{r.rows} x {r.columns}",
        f"{r.ms['ours']:.1f}",
        f"{r.ratios['eager']:.1f}x",
        f"{r.ratios['compile']:.1f}x",
        f"{r.share_of_copy:.0%}",
        f"{r.gradient_error['ours']:.1e} / {r.gradient_error['eager']:.1e}",
    )


def save_loss(results: list[Measurement], folder: Path) -> Path:
    """Write ``loss-cpu-<date>.json`` and the same as a Markdown table, and return the JSON's path."""
    rows = [{**asdict(result), "ratios": result.ratios} for result in results]
    return save("loss-cpu", folder, {"results": rows}, markdown(COLUMNS, map(cells, results)))
