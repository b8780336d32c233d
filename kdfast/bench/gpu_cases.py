"""What is timed on a GPU: losses forward and backward, capture, decoding; each against who else can do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdfast import SoftLabels, kd_loss
from kdfast.bench.gpu_timing import Run, interleaved_ms, replay_ms
from kdfast.bench.loss import CASES as CPU_CASES
from kdfast.bench.loss import Case, Loss, _eager
from kdfast.testing import relative_error

__all__ = ["CASES", "SHAPES", "GpuCase", "Result", "measure"]

SHAPES = [(8192, 32000), (8192, 50257), (8192, 128256), (8192, 151936), (8192, 262144)]


@dataclass(frozen=True)
class GpuCase:
    """One line of the table.

    ``bytes``: per column of a row that a perfect implementation moves through memory. ``compile``: whether
    torch.compile is among the contenders, which takes it many seconds.
    """

    name: str
    rows: int
    columns: int
    dtype: torch.dtype
    kind: str  # dense, sparse, capture, graph
    bytes: float
    case: Case = field(default_factory=lambda: CPU_CASES["kl"])
    compile: bool = False


@dataclass(frozen=True)
class Result:
    """Median milliseconds of each contender, in one run; one that failed says why instead."""

    name: str
    rows: int
    columns: int
    dtype: str
    ms: dict[str, float]
    failed: dict[str, str]
    gb_s: float  # of ours, at the fewest bytes
    peak_mib: dict[str, float]  # beyond the inputs
    gradient_error: dict[str, float] = field(default_factory=dict)


def _cases() -> Iterator[GpuCase]:
    bf16 = torch.bfloat16
    for rows, columns in SHAPES:
        yield GpuCase("kl-tau2", rows, columns, bf16, "dense", 6, compile=columns == 128256)
    for name, case in {
        "kl-tau1": Case("forward_kl", 1.0),
        "kl-tau3.3": Case("forward_kl", 3.3),
        "kl-row-tau": Case("forward_kl", None),
        "kl-inplace": Case("forward_kl", 2.0, "inplace"),
        "rkl": Case("reverse_kl", 2.0),
        "jsd": Case("jsd", 2.0),
    }.items():
        yield GpuCase(name, 8192, 128256, bf16, "dense", 6, case, compile=name == "jsd")
    yield GpuCase("kl-tau2", 8192, 128256, torch.float32, "dense", 12)
    for rows, columns in ((8192, 32000), (8192, 128256), (8192, 262144)):
        yield GpuCase("sparse-k64", rows, columns, bf16, "sparse", 4, compile=columns == 128256)
    yield GpuCase("threshold-.02", 2048, 128256, bf16, "capture", 2)
    for rows, columns in ((8, 128256), (64, 32000)):
        yield GpuCase("kl-graph", rows, columns, bf16, "graph", 6)


CASES = list(_cases())


def measure(case: GpuCase, repeats: int = 15) -> Result:
    """Times a case's contenders in turn."""
    torch.cuda.empty_cache()
    student, teacher, labels, tau = _inputs(case)
    contenders = _CONTENDERS[case.kind](case, student, teacher, labels, tau)
    runs, failed, peak = {}, {}, {}
    for name, make in contenders.items():
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
    bytes_moved = case.bytes * case.rows * case.columns
    dtype = str(case.dtype).removeprefix("torch.")
    gb_s = bytes_moved / ms["ours"] / 1e6 if "ours" in ms else float("nan")
    errors = _gradient_errors(case) if case.kind == "dense" and case.columns == 128256 else {}
    return Result(case.name, case.rows, case.columns, dtype, ms, failed, gb_s, peak, errors)


def _inputs(case: GpuCase) -> tuple[Tensor, Tensor, Tensor, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": "cuda"}
    student, teacher = (torch.randn(case.rows, case.columns, dtype=case.dtype, **options).mul_(3) for _ in range(2))
    labels = torch.randint(case.columns, (case.rows,), **options)
    tau = torch.rand(case.rows, **options) + 1.5 if case.case.temperature is None else case.case.temperature
    return student, teacher, labels, tau


Contenders = dict[str, Callable[[], Run]]


def _step(loss: Callable[[Tensor], Tensor], student: Tensor, inplace: bool = False) -> Run:
    """Forward and backward; the gradient is dropped, as a training step that has used it would."""
    leaf = student.requires_grad_()

    def run() -> None:
        logits = leaf.view_as(leaf) if inplace else leaf
        torch.autograd.grad(loss(logits), logits)

    return run


def _ours(case: Case) -> Loss:
    def loss(s: Tensor, t: Tensor, y: Tensor, tau: Any) -> Tensor:
        return kd_loss(  # type: ignore[no-any-return]
            s, t, y, divergence=case.divergence, temperature=tau, ce_weight=1.0, backward=case.backward
        )

    return loss


def _dense(case: GpuCase, student: Tensor, teacher: Tensor, labels: Tensor, tau: Any) -> Contenders:
    eager, inplace = _eager(case.case), case.case.backward == "inplace"

    def of(loss: Loss, inplace: bool = False) -> Callable[[], Run]:
        return lambda: _step(lambda s: loss(s, teacher, labels, tau), student, inplace)

    contenders = {"ours": of(_ours(case.case), inplace), "eager": of(eager)}
    if case.compile:
        torch.compiler.reset()
        contenders["compile"] = of(torch.compile(eager))
    contenders["liger"] = lambda: of(_liger(case.case))()  # importing it may fail, which is a finding
    return contenders


def _liger(case: Case) -> Loss:
    """Liger-Kernel's own kernels, on the log-probabilities that they want."""
    from liger_kernel.transformers.functional import liger_cross_entropy, liger_jsd, liger_kl_div

    def loss(s: Tensor, t: Tensor, y: Tensor, tau: Any) -> Tensor:
        scale = tau[:, None].to(s.dtype) if isinstance(tau, Tensor) else tau
        log_q, log_p = torch.log_softmax(s / scale, -1), torch.log_softmax(t / scale, -1)
        if case.divergence == "jsd":
            kd = liger_jsd(log_q, log_p)
        elif case.divergence == "forward_kl" and not isinstance(tau, Tensor):
            kd = liger_kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        else:
            raise NotImplementedError(f"Liger-Kernel has no {case.divergence} of these temperatures")
        total: Tensor = liger_cross_entropy(s, y) + tau**2 * kd
        return total

    return loss


def _sparse(case: GpuCase, student: Tensor, teacher: Tensor, labels: Tensor, tau: Any) -> Contenders:
    log_probs, ids = teacher[:64].float().log_softmax(-1).topk(64)
    repeat = case.rows // 64
    log_probs, ids = log_probs.repeat(repeat, 1), ids.repeat(repeat, 1)
    tails = torch.log1p(-log_probs.exp().sum(-1))[None]
    soft = SoftLabels.topk(ids, log_probs, tails, vocab_size=case.columns, temperatures=(1.0,))

    def eager(s: Tensor) -> Tensor:
        """Top-k forward KL with a tail bucket, as frameworks write it."""
        log_q = torch.log_softmax(s.float(), -1)
        heads = log_q.gather(1, ids)
        rest = torch.log1p(-heads.exp().sum(-1).clamp(max=1 - 1e-6))
        kl = (log_probs.exp() * (log_probs - heads)).sum(-1) + tails[0].exp() * (tails[0] - rest)
        return kl.mean() + torch.nn.functional.nll_loss(log_q, labels)

    contenders: Contenders = {
        "ours": lambda: _step(lambda s: kd_loss(s, soft, labels, ce_weight=1.0), student),
        "eager": lambda: _step(eager, student),
    }
    if case.compile:
        torch.compiler.reset()
        contenders["compile"] = lambda: _step(torch.compile(eager), student)
    return contenders


def _capture(case: GpuCase, student: Tensor, teacher: Tensor, labels: Tensor, tau: Any) -> Contenders:
    from kdfast.cache.select import threshold, top

    return {
        "ours": lambda: lambda: threshold(teacher, temperature=1.0, tau=0.02, seed=0),
        "top-16": lambda: lambda: top(teacher, temperature=1.0, k=16),
        "logsumexp": lambda: lambda: torch.logsumexp(teacher.float(), -1),
        "torch.topk 16": lambda: lambda: teacher.topk(16),
    }


_CONTENDERS = {"dense": _dense, "graph": _dense, "sparse": _sparse, "capture": _capture}


def _gradient_errors(case: GpuCase) -> dict[str, float]:
    """Against float64, of a few rows, at logits of standard deviation 1, 3 and 10."""
    errors = {}
    for scale in (1, 3, 10):
        generator = torch.Generator("cuda").manual_seed(scale)
        options: dict[str, Any] = {"generator": generator, "device": "cuda"}
        s, t = (torch.randn(16, case.columns, dtype=case.dtype, **options).mul_(scale) for _ in range(2))
        y = torch.randint(case.columns, (16,), **options)
        tau = case.case.temperature or torch.linspace(1.5, 2.5, 16, device="cuda")
        exact = _gradient(_eager(case.case), s.double(), t.double(), y, tau)
        errors[f"ours, std {scale}"] = relative_error(_gradient(_ours(case.case), s, t, y, tau), exact)
        errors[f"eager, std {scale}"] = relative_error(_gradient(_eager(case.case), s, t, y, tau), exact)
    return errors


def _gradient(loss: Loss, s: Tensor, t: Tensor, y: Tensor, tau: Any) -> Tensor:
    leaf = s.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf * 1, t, y, tau), leaf)[0]
