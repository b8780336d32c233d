"""Row ops on rows that lie between poisoned padding: any access of it ends the process. For ``sanitize.py``.

Every tensor that an op reads is the inside of a larger one, whose remainder AddressSanitizer guards: not only what lies
behind the last row, which its allocator guards anyhow, but what lies between two rows. Without the sanitizer the
padding is NaN, and the results must not show it.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdfast import Divergence, SoftLabels, kd_loss
from kdfast.divergences import DIVERGENCES

try:
    _POISON = ctypes.CDLL(None).__asan_poison_memory_region
    _HEAL = ctypes.CDLL(None).__asan_unpoison_memory_region
except AttributeError:
    _POISON = _HEAL = None
else:
    for call in (_POISON, _HEAL):
        call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t), None


class Padded:
    """(rows, columns) values with ``gap`` bytes, a multiple of 64, of padding between the rows."""

    def __init__(self, values: Tensor, gap: int) -> None:
        rows, columns = values.shape
        size = values.element_size()
        # A row's end is guarded to the byte, the padding's end to eight.
        pitch = (columns * size + gap + 63) // 64 * 64 // size
        self.storage = torch.full((rows, pitch), float("nan"), dtype=values.dtype)
        self.view = self.storage[:, :columns]
        self.view.copy_(values)
        self.guards = []
        for row in range(rows):
            start = self.storage[row].data_ptr() + columns * size
            self.guards.append((start, pitch * size - columns * size))

    @contextmanager
    def guarded(self) -> Iterator[Tensor]:
        """The view, while its padding must not be touched."""
        for guard in self.guards if _POISON else ():
            _POISON(*guard)
        try:
            yield self.view
        finally:
            for guard in self.guards if _HEAL else ():
                _HEAL(*guard)


def trial(rng: random.Random) -> None:
    """One call on padded rows, whose results must equal those on packed ones."""
    rows, columns = rng.choice([1, 2, 5]), rng.choice([2, 3, 5, 15, 16, 17, 31, 33, 63, 65, 127, 513, 1025])
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    gap = rng.choice([64, 128])
    student = Padded((torch.randn(rows, columns) * 3).to(dtype), gap)
    teacher = Padded((torch.randn(rows, columns) * 3).to(rng.choice([dtype, torch.float32])), gap)
    labels = torch.randint(0, columns, (rows,))
    names = [name for name in DIVERGENCES if name != "dkd" or columns > 2]
    options = {
        "divergence": Divergence(rng.choice(names), standardize=rng.random() < 0.2),
        "temperature": rng.choice([1.0, 2.0, 3.3]),
        "ce_weight": rng.choice([0.0, 0.5]),
        "reduction": rng.choice(["mean", "none"]),
        "backward": rng.choice(["fused", "recompute"]),
    }
    if rng.random() < 0.3:
        options["divergence"], options["teacher_temperature"] = "soft_ce", 1.0
        ids = torch.stack([torch.randperm(columns)[: min(4, columns)] for _ in range(rows)])
        soft = SoftLabels.topk(ids, torch.full(ids.shape, -2.0), torch.full((rows,), -0.5), vocab_size=columns)
        with student.guarded() as s:
            got = _loss_and_gradient(s, soft, labels, options)
        wanted = _loss_and_gradient(student.view.clone(), soft, labels, options)
    else:
        with student.guarded() as s, teacher.guarded() as t:
            got = _loss_and_gradient(s, t, labels, options)
        wanted = _loss_and_gradient(student.view.clone(), teacher.view.clone(), labels, options)
    for ours, right in zip(got, wanted, strict=True):
        if not torch.equal(ours, right):
            raise SystemExit(f"padding shows: {options} {dtype} ({rows}, {columns})")


def _loss_and_gradient(student: Tensor, teacher: Tensor | SoftLabels, labels: Tensor, options: dict) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    loss = kd_loss(leaf, teacher, labels, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return [loss.detach(), gradient]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, calls, end = random.Random(args.seed), 0, time.monotonic() + args.seconds
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    while time.monotonic() < end:
        trial(rng)
        calls += 1
    print(f"{calls} calls, 0 failures{'' if _POISON else ' (no sanitizer: NaN alone guards)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
