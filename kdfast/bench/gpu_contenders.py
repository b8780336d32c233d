"""The contenders of a GPU case: kdfast, and other implementations. Each is made by itself, since some may fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import SoftLabels, kd_loss
from kdfast.bench.gpu_cases import GpuCase
from kdfast.bench.head_contenders import HeadCase, head_contenders
from kdfast.bench.loss import Case, Loss, eager, ours
from kdfast.bench.steps import Contenders, Run, compiled, step
from kdfast.cache.codecs.weights import Sample

__all__ = ["contenders"]


def contenders(case: GpuCase, device: str) -> Contenders:
    """The contenders of a case by name, on the same random logits, of standard deviation 3.

    On the CPU they are the same computations, by which tests compare contenders without a GPU.
    """
    options: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    shape = case.rows, case.columns
    if case.kind == "decode":
        return _decode(case, device)
    labels = torch.randint(case.columns, (case.rows,), **options)
    if case.kind == "head":
        head = HeadCase(case.name.removeprefix("head-"), case.rows, case.columns, case.width, case.dtype)
        return head_contenders(head, device, compile=case.compile)
    student, teacher = (torch.randn(shape, dtype=case.dtype, **options).mul_(3) for _ in range(2))
    if case.kind == "sparse":
        return _sparse(case, student, teacher, labels)
    if case.kind == "capture":
        return _capture(teacher)
    tau = case.case.temperature or torch.rand(case.rows, **options) + 1.5
    return _dense(case, student, teacher, labels, tau)


@contextmanager
def _forced(kernels: str) -> Iterator[None]:
    before = os.environ.get("KDFAST_GPU")
    os.environ["KDFAST_GPU"] = kernels
    try:
        yield
    finally:
        if before is None:
            del os.environ["KDFAST_GPU"]
        else:
            os.environ["KDFAST_GPU"] = before


def _by(kernels: str, run: Run) -> Run:
    def forced() -> Any:
        with _forced(kernels):
            return run()

    return forced


# ---- losses ---------------------------------------------------------------------------------------------------------


def _dense(case: GpuCase, student: Tensor, teacher: Tensor, labels: Tensor, tau: Any) -> Contenders:
    inplace = case.case.backward == "inplace"

    def of(loss: Loss, inplace: bool = False) -> Run:
        return step(lambda s: loss(s, teacher, labels, tau), student, inplace=inplace)

    made: Contenders = {
        "ours": lambda: of(ours(case.case), inplace),
        "eager": lambda: of(eager(case.case)),
        "liger": lambda: of(_liger(case.case)),
    }
    for kernels in case.others:
        made[kernels] = lambda kernels=kernels: _by(kernels, of(ours(case.case), inplace))  # type: ignore[misc]
    if case.compile:
        made["compile"] = compiled(of, eager(case.case))
    return made


def _liger(case: Case) -> Loss:
    """Liger-Kernel's own kernels, on the log-probabilities that they take."""
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


def _sparse(case: GpuCase, student: Tensor, teacher: Tensor, labels: Tensor) -> Contenders:
    some = min(64, case.rows)
    log_probs, ids = teacher[:some].float().log_softmax(-1).topk(64)
    log_probs, ids = log_probs.repeat(case.rows // some, 1), ids.repeat(case.rows // some, 1)
    tails = torch.log1p(-log_probs.exp().sum(-1))[None]
    soft = SoftLabels.topk(ids, log_probs, tails, vocab_size=case.columns, temperatures=(1.0,))

    def gathered(s: Tensor) -> Tensor:
        """Top-k forward KL with a tail bucket, as distillation frameworks compute it."""
        log_q = torch.log_softmax(s.float(), -1)
        heads = log_q.gather(1, ids)
        rest = torch.log1p(-heads.exp().sum(-1).clamp(max=1 - 1e-6))
        kl = (log_probs.exp() * (log_probs - heads)).sum(-1) + tails[0].exp() * (tails[0] - rest)
        return kl.mean() + F.nll_loss(log_q, labels)

    def fused(s: Tensor) -> Tensor:
        return kd_loss(s, soft, labels, ce_weight=1.0)  # type: ignore[no-any-return]

    made: Contenders = {"ours": lambda: step(fused, student), "eager": lambda: step(gathered, student)}
    for kernels in case.others:
        made[kernels] = lambda kernels=kernels: _by(kernels, step(fused, student))  # type: ignore[misc]
    if case.compile:
        made["compile"] = compiled(lambda loss: step(loss, student), gathered)
    return made


# ---- the cache ------------------------------------------------------------------------------------------------------


def _capture(teacher: Tensor) -> Contenders:
    from kdfast.cache.selection.select import threshold, top

    return {
        "ours": lambda: lambda: threshold(teacher, temperature=1.0, tau=0.02, seed=0),
        "top-16": lambda: lambda: top(teacher, temperature=1.0, k=16),
        "logsumexp": lambda: lambda: torch.logsumexp(teacher.float(), -1),
        "torch.topk 16": lambda: lambda: teacher.topk(16),
    }


def _decode(case: GpuCase, device: str) -> Contenders:
    """Decode one block of rows, with probabilities distributed as words' are, until there are ``case.rows`` rows."""
    block = min(1024, case.rows)
    noise = torch.randn(block, case.columns, generator=torch.Generator().manual_seed(0))
    logits = noise - 1.2 * torch.arange(1, case.columns + 1).log()
    codec = Sample(case.columns, [1.0], draws=50, coding=case.name.removeprefix("decode-"))
    labels = codec.select(logits, bytes(16))
    if codec.learn_rows:
        codec.use_model(codec.learn(labels))
    data = np.frombuffer(codec.encode(labels), np.uint8)
    unit = np.array([[0, len(data), block]])
    if codec.coding != "blocks":
        spans = codec.locate(data, unit.repeat(block, 0), np.arange(block))
        unit = np.concatenate([spans, np.ones((block, 1), np.int64)], 1)
    units, wanted = np.tile(unit, (case.rows // block, 1)), np.arange(case.rows)
    there = torch.from_numpy(data.copy()).to(device)
    return {
        "ours": lambda: lambda: codec.decode_on_device(there, units, wanted),
        "cpu": lambda: lambda: codec.decode(data, units, wanted),
    }
