"""Random calls of kd_loss: every kind of student, teacher, label and option, drawn from a seed and a number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdfast import Head, SoftLabels, kd_loss
from kdfast.divergences import DIVERGENCES, Divergence
from kdfast.labels import OutputLayer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (2, 3, 4, 7, 8, 10, 15, 16, 17, 31, 33, 40, 63, 100, 129, 257, 1000, 1025, 2100)
SPREADS = (0.01, 1.0, 1.0, 4.0, 12.0)


@dataclass
class Entries:
    """A few (id, value) of each row, and what they leave out: topk, weights or prototype labels, not yet kdfast's."""

    ids: list[list[int]]
    values: list[list[float]]  # log-probabilities, weights or probabilities
    log_tails: list[list[float]] | None  # a list of rows for each temperature
    temperatures: tuple[float, ...]
    prototype_ids: list[int] | None = None
    prototypes: Tensor | None = None


@dataclass
class Case:
    """One call. ``student`` and ``teacher`` are what kd_loss takes, but that gradients are asked of ``leaves``."""

    about: str
    shape: tuple[int, ...]
    student_logits: Tensor | None
    student_head: dict[str, Any] | None
    teacher_logits: Tensor | None
    teacher_head: dict[str, Any] | None
    teacher_entries: Entries | None
    teacher_kind: str
    teacher_columns: int
    present: Tensor | None
    labels: Tensor | None
    divergence: Divergence
    options: dict[str, Any]
    upstream: Tensor | float
    layout: Callable[[Tensor], Tensor]
    leaves: list[Tensor] = field(default_factory=list)

    @property
    def columns(self) -> int:
        return self.student_logits.shape[-1] if self.student_head is None else len(self.student_head["weight"])

    def call(self) -> Any:
        """kd_loss of the case, with ``leaves`` made anew."""
        return kd_loss(self._student(), self._teacher(), self.labels, divergence=self.divergence, **self.options)

    def _student(self) -> Tensor | Head:
        if self.student_head is None:
            leaf = self.student_logits.clone().requires_grad_()
            self.leaves = [leaf]
            return self.layout(leaf)
        head = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in self.student_head.items()}
        self.leaves = [v for v in head.values() if isinstance(v, Tensor)]
        return Head(**head)

    def _teacher(self) -> Tensor | Head | SoftLabels:
        if self.teacher_kind == "head":
            return Head(**self.teacher_head)
        if self.teacher_kind == "logits":
            return self.teacher_logits
        if self.teacher_kind == "dense":
            return SoftLabels.dense(self.teacher_logits.reshape(-1, self.teacher_columns), present=self.present)
        if self.teacher_kind == "hidden":
            head = self.teacher_head
            layer = OutputLayer(head["weight"], head.get("bias"), scale=head["scale"], softcap=head["softcap"])
            return SoftLabels.hidden(head["hidden"].reshape(-1, layer.width), layer, present=self.present)
        return self._ragged()

    def _ragged(self) -> SoftLabels:
        e = self.teacher_entries
        counts = torch.tensor([0, *(len(row) for row in e.ids)])
        ids = torch.tensor([i for row in e.ids for i in row], dtype=torch.int64)
        values = torch.tensor([v for row in e.values for v in row])
        shared: dict[str, Any] = {"vocab_size": self.teacher_columns, "present": self.present}
        shared["offsets"] = counts.cumsum(0)
        if self.teacher_kind == "weights":
            return SoftLabels.weights(ids, values, temperature=e.temperatures[0], **shared)
        tails = torch.tensor(e.log_tails)
        if self.teacher_kind == "topk":
            return SoftLabels.topk(ids, values, tails, temperatures=e.temperatures, **shared)
        table = e.prototypes
        return SoftLabels.prototype(
            ids, values, tails[0], torch.tensor(e.prototype_ids), table, temperature=e.temperatures[0], **shared
        )


def draw(seed: int, number: int) -> Case:
    """Case ``number`` of ``seed``: the same for ever."""
    return _Draw(random.Random(f"{seed}/{number}")).case()


class _Draw:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.torch = torch.Generator().manual_seed(rng.getrandbits(48))

    def maybe(self, share: float) -> bool:
        return self.rng.random() < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.torch)

    def case(self) -> Case:
        pick = self.rng.choice
        columns = pick(WIDTHS)
        shape = pick([(3,), (5,), (2, 3), (2, 1, 3), (1,), (4, 2)])
        kind = pick(["logits", "logits", "logits", "dense", "topk", "weights", "prototype", "head", "hidden"])
        div = self.divergence(kind, columns)
        other = self.other_columns(columns) if kind in ("logits", "head") and div.name != "dkd" else columns
        logits, head = self.student(shape, columns)
        teacher_head = self.head(shape, other, pick(FLOATS[:2])) if kind in ("head", "hidden") else None
        teacher_logits = self.teacher(shape, other, logits) if kind in ("logits", "dense") else None
        if logits is not None and teacher_logits is not None:
            self.mask(logits, teacher_logits)
        options, entries = self.options(kind, shape, columns)
        options["vocab"] = "same" if other == columns else "shared"
        shift = options["shift"]
        labels = self.labels(shape, columns, logits, div, shift)
        self.weights(options, shape, labels)
        present = None
        if kind not in ("logits", "head") and self.maybe(0.2):
            present = torch.rand(math.prod(shape), generator=self.torch) < 0.7
        upstream: Tensor | float = pick([1.0, 1.0, 0.37, 1024.0])
        if options["reduction"] == "none":
            upstream = self.normal(*shape[:-1], shape[-1] - 1) if shift else self.normal(*shape)
        dtype = (logits if head is None else head["hidden"]).dtype
        return Case(
            about=f"{kind} {div} student {'head' if head else 'logits'} {dtype} {shape} x {columns}/{other}",
            shape=shape,
            student_logits=logits,
            student_head=head,
            teacher_logits=teacher_logits,
            teacher_head=teacher_head,
            teacher_entries=entries,
            teacher_kind=kind,
            teacher_columns=other,
            present=present,
            labels=labels,
            divergence=div,
            options=options,
            upstream=upstream,
            layout=self.layout(options, head, dtype),
        )

    # ---- the two sides ----------------------------------------------------------------------------------------------

    def divergence(self, kind: str, columns: int) -> Divergence:
        if kind == "weights":
            return Divergence("soft_ce")
        if kind == "topk":
            return Divergence(self.rng.choice(["forward_kl", "soft_ce"]))
        names = [name for name in DIVERGENCES if name != "dkd" or columns > 3]
        if kind == "prototype":
            names.remove("logit_mse")
        name, share = self.rng.choice(names), self.rng.uniform
        standardize = kind != "prototype" and self.maybe(0.15)
        if name == "jsd" and self.maybe(0.5):
            normalize = self.maybe(0.5)
            beta = self.rng.choice([0.0, 1.0, share(0.05, 0.95)]) if normalize else share(0.05, 0.95)
            return Divergence("jsd", a=beta, normalize=normalize, standardize=standardize)
        if name.startswith("skew_") and self.maybe(0.5):
            return Divergence(name, a=self.rng.choice([0.0, share(0.02, 0.95)]), standardize=standardize)
        if name == "alpha_beta" and self.maybe(0.5):
            return Divergence(name, a=share(0.2, 1.2), b=share(0.2, 1.2), standardize=standardize)
        if name == "dkd" and self.maybe(0.5):
            return Divergence(name, a=share(0.1, 2.0), b=share(0.1, 9.0), standardize=standardize)
        return Divergence(name, standardize=standardize)

    def other_columns(self, columns: int) -> int:
        """A teacher's vocabulary: mostly the student's, else padded a little more or less."""
        if columns < 300 or self.maybe(0.7):
            return columns
        return columns + self.rng.choice([-1, 1, -2, 3])

    def student(self, shape: tuple[int, ...], columns: int) -> tuple[Tensor | None, dict[str, Any] | None]:
        """Logits, or what makes them."""
        dtype = self.rng.choice(FLOATS)
        if self.maybe(0.25):
            return None, self.head(shape, columns, dtype)
        return (self.normal(*shape, columns) * self.rng.choice(SPREADS)).to(dtype), None

    def teacher(self, shape: tuple[int, ...], columns: int, student: Tensor | None) -> Tensor:
        """Logits of their own, or nearly the student's."""
        own = self.normal(*shape, columns) * self.rng.choice(SPREADS)
        if student is not None and self.maybe(0.15):
            shared = min(columns, student.shape[-1])
            own[..., :shared] = student[..., :shared].float() + 1e-3 * self.normal(*shape, shared)
            return own.to(student.dtype)
        return own.to(self.rng.choice(FLOATS))

    def head(self, shape: tuple[int, ...], columns: int, dtype: torch.dtype) -> dict[str, Any]:
        width = self.rng.choice([1, 4, 16])
        head: dict[str, Any] = {
            "hidden": self.normal(*shape, width).to(dtype),
            "weight": self.normal(columns, width).to(dtype),
            "scale": self.rng.choice([1.0, 1.0, 0.25]),
            "softcap": self.rng.choice([None, None, 5.0]),
        }
        if self.maybe(0.4):
            head["bias"] = self.normal(columns).to(dtype)
        return head

    def mask(self, student: Tensor, teacher: Tensor) -> None:
        """-inf in both sides' columns, in one side's alone, in whole tiles, or nowhere."""
        shared = min(student.shape[-1], teacher.shape[-1])
        if shared < 4 or not self.maybe(0.4):
            return
        how = self.rng.choice(["both", "student", "teacher", "each"])
        dead = torch.rand(shared, generator=self.torch) < self.rng.choice([0.1, 0.5, 0.95])
        if self.maybe(0.3):
            dead[: self.rng.choice([16, 32, shared])] = True
        keep = self.rng.sample(range(shared), 2)
        dead[keep] = False
        if how in ("both", "student"):
            student[..., :shared][..., dead] = -math.inf
        if how in ("both", "teacher"):
            teacher[..., :shared][..., dead] = -math.inf
        if how == "each":
            student[..., :shared][..., dead & (torch.rand(shared, generator=self.torch) < 0.5)] = -math.inf
            teacher[..., :shared][..., dead & (torch.rand(shared, generator=self.torch) < 0.5)] = -math.inf

    def entries(self, kind: str, shape: tuple[int, ...], columns: int, tau: float) -> Entries:
        rows = math.prod(shape)
        temperatures: tuple[float, ...] = (tau,) if kind != "topk" else tuple({tau, 1.0, 2.0})
        ids, values, tails = [], [], [[0.0] * rows for _ in temperatures]
        for row in range(rows):
            k = self.rng.randint(0 if kind != "topk" else 1, min(columns - 1, 12))
            chosen = self.rng.sample(range(columns), k)
            p = [self.rng.random() + 1e-3 for _ in chosen]
            mass = self.rng.choice([0.9, 0.5, 0.05, 1.0]) if k else 0.0
            p = [x / sum(p) * mass for x in p]
            ids.append(chosen)
            values.append([math.log(x) for x in p] if kind == "topk" else p)
            for i, t in enumerate(temperatures):
                left = 1.0 - mass if t == 1.0 or kind != "topk" else self.rng.choice([0.0, 0.3])
                tails[i][row] = math.log(left) if left > 1e-9 else -math.inf
            if kind == "weights" and k and self.maybe(0.2):
                ids[-1].append(chosen[0])  # drawn twice
                values[-1].append(0.25)
            if self.maybe(0.2):  # padding
                ids[-1].append(self.rng.choice([0, *chosen]))
                values[-1].append(-math.inf if kind == "topk" else 0.0)
        if kind != "prototype":
            return Entries(ids, values, tails if kind == "topk" else None, temperatures)
        table = torch.rand(3, columns, generator=self.torch) + 1e-2
        table = table.to(self.rng.choice([torch.float32, torch.bfloat16]))
        return Entries(ids, values, tails, temperatures, [self.rng.randrange(3) for _ in range(rows)], table)

    def layout(
        self, options: dict[str, Any], head: dict[str, Any] | None, dtype: torch.dtype
    ) -> Callable[[Tensor], Tensor]:
        """A view of a leaf that has the same values and other strides; a copy where the gradient is to overwrite it."""
        options["backward"] = self.rng.choice(["fused", "fused", "recompute"])
        narrow = dtype in (torch.float32, torch.bfloat16)
        if head is None and narrow and options["reduction"] != "none" and self.maybe(0.15):
            options["backward"] = "inplace"
            return lambda x: x * 1.0
        how = self.rng.choice(["plain", "plain", "transposed", "sliced"])
        if how == "transposed":
            return lambda x: x.transpose(-1, 0).contiguous().transpose(-1, 0)
        if how == "sliced":
            return lambda x: torch.cat([x, torch.zeros_like(x[..., :1])], -1)[..., :-1]
        return lambda x: x

    # ---- options ----------------------------------------------------------------------------------------------------

    def options(self, kind: str, shape: tuple[int, ...], columns: int) -> tuple[dict[str, Any], Entries | None]:
        """What a call is given by keyword, and the entries of a teacher that has a few, at a temperature among them."""
        pick = self.rng.choice
        tau = pick([1.0, 1.0, 2.0, 4.0, 0.5, 3.3])
        options: dict[str, Any] = {
            "temperature": self.number(tau, shape),
            "teacher_temperature": pick([None, 1.0, 2.5]),
            "scale_by_t2": self.maybe(0.7),
            "kd_weight": self.number(pick([1.0, 0.3, 0.0]), shape),
            "ce_weight": self.number(pick([0.0, 0.7]), shape),
            "z_weight": pick([0.0, 0.0, 1e-2]),
            "label_smoothing": pick([0.0, 0.1, 1.0]),
            "shift": len(shape) > 1 and shape[-1] > 1 and self.maybe(0.2),
            "reduction": pick(["mean", "mean", "sum", "none"]),
            "return_parts": self.maybe(0.4),
        }
        if kind not in ("topk", "weights", "prototype"):
            return options, None
        entries = self.entries(kind, shape, columns, tau)
        options["teacher_temperature"] = pick(entries.temperatures)
        return options, entries

    def number(self, value: float, shape: tuple[int, ...]) -> float | Tensor:
        """A number as it is, as a tensor, or another one for each row."""
        how = self.rng.random()
        if how < 0.75:
            return value
        if how < 0.85:
            return torch.tensor(value)
        return value * (0.5 + torch.rand(shape, generator=self.torch))

    def labels(
        self, shape: tuple[int, ...], columns: int, logits: Tensor | None, div: Divergence, shift: bool
    ) -> Tensor | None:
        live = torch.ones(*shape, columns, dtype=torch.bool) if logits is None else logits > -math.inf
        if shift:
            live = live.roll(1, -2)  # position i is compared with label i + 1
        if div.name == "dkd" or self.maybe(0.7):
            scores = torch.rand(*shape, columns, generator=self.torch).masked_fill(~live, -1.0)
            labels = scores.argmax(-1)
            ignored = torch.rand(shape, generator=self.torch) < self.rng.choice([0.0, 0.3, 1.0])
            labels[ignored] = -100
            return labels
        if self.maybe(0.5):
            probs = torch.rand(*shape, columns, generator=self.torch).masked_fill(~live, 0.0)
            return probs / probs.sum(-1, keepdim=True)
        return None

    def weights(self, options: dict[str, Any], shape: tuple[int, ...], labels: Tensor | None) -> None:
        if labels is None:
            options["ce_weight"] = 0.0
        weights = [options[name] for name in ("kd_weight", "ce_weight", "z_weight")]
        if not any(isinstance(w, Tensor) or w for w in weights):
            options["return_parts"] = False  # of no term at all
        if isinstance(options["ce_weight"], float) and options["ce_weight"] == 0.0:
            options["label_smoothing"] = 0.0
        how = self.rng.random()
        if how < 0.2:
            options["row_weight"] = torch.rand(shape, generator=self.torch) < 0.6
        elif how < 0.4:
            options["row_weight"] = torch.rand(shape, generator=self.torch) * 2
        if options["reduction"] == "mean" and self.maybe(0.3):
            options["num_items"] = self.rng.choice([7, 3, torch.tensor(11)])
