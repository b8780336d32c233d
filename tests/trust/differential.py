"""A differential fuzzer of kd_loss: random calls of its whole option space against ``oracle``, gradients first.

    python tests/trust/differential.py --cases 100000        # or --seconds 60
    python tests/trust/differential.py --seed 3 --only 1234  # one case again, with what was passed

The last line counts cases and failures. Exit code 1: a case failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import oracle
from cases import Case, draw


def truth(case: Case, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], dict[str, Tensor], Tensor, Tensor]:
    """(rows,) losses with their weights in, gradients, parts, which rows count, and a size for each row's rounding."""
    leaves, logits = _student_logits(case, dtype)
    rows = math.prod(case.shape)
    s_rows, counted, weight = logits.reshape(rows, -1), _counted(case), _row_weight(case)
    losses, sizes, parts = [], [], {"kd": [], "ce": [], "entropy": []}
    for row in range(rows):
        if not counted[row]:
            losses.append(torch.zeros((), dtype=dtype))
            sizes.append(0.0)
            for values in parts.values():
                values.append(0.0)
            continue
        loss, size, row_parts = _row(case, row, s_rows[row], dtype)
        w = float(weight[row])
        losses.append(w * loss if w else torch.zeros((), dtype=dtype))
        sizes.append(abs(w) * size)
        for name, value in row_parts.items():
            parts[name].append(float(value.detach()))
    loss = torch.stack(losses)
    up = case.upstream
    total = _upstream(case, rows, dtype) * torch.where(counted, loss, 0.0)
    finite = torch.isfinite(loss)
    anchor = 0.0 * sum(leaf.sum() for leaf in leaves if bool(torch.isfinite(leaf).all()))
    if isinstance(anchor, Tensor) or total.requires_grad:
        grads = torch.autograd.grad(total[finite].sum() + anchor, leaves, allow_unused=True)
    else:
        grads = [None] * len(leaves)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    size = torch.tensor(sizes, dtype=torch.float64) * (up if isinstance(up, float) else 1.0)
    return loss.detach(), grads, {k: torch.tensor(v, dtype=torch.float64) for k, v in parts.items()}, counted, size


def _student_logits(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    if case.student_head is None:
        leaf = case.student_logits.to(dtype).requires_grad_()
        return [leaf], leaf
    head = {k: v.to(dtype).requires_grad_() if isinstance(v, Tensor) else v for k, v in case.student_head.items()}
    return [v for v in head.values() if isinstance(v, Tensor)], _head_logits(head)


def _head_logits(head: dict[str, Any]) -> Tensor:
    logits = head["hidden"] @ head["weight"].T
    logits = head["scale"] * (logits + head["bias"] if "bias" in head else logits)
    return logits if head["softcap"] is None else head["softcap"] * torch.tanh(logits / head["softcap"])


def _number(value: float | Tensor, row: int, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=dtype)
    return (value.reshape(-1)[row] if value.dim() else value).to(dtype)


def _counted(case: Case) -> Tensor:
    rows = math.prod(case.shape)
    counted = torch.ones(rows, dtype=torch.bool)
    index = _label_index(case)
    if index is not None:
        counted &= index != -100
    if case.options["shift"]:
        counted &= (torch.arange(rows) + 1) % case.shape[-1] != 0
    mask = case.options.get("row_weight")
    if mask is not None and mask.dtype == torch.bool:  # of the labels, as they are compared
        counted &= (mask.roll(-1, -1) if case.options["shift"] else mask).reshape(-1)
    return counted if case.present is None else counted & case.present


def _label_index(case: Case) -> Tensor | None:
    if case.labels is None or case.labels.is_floating_point():
        return None
    return (case.labels.roll(-1, -1) if case.options["shift"] else case.labels).reshape(-1)


def _row_weight(case: Case) -> Tensor:
    counted = _counted(case)
    weight = counted.double()
    given = case.options.get("row_weight")
    if given is not None and given.dtype != torch.bool:
        weight = weight * given.double().reshape(-1)
    if case.options["reduction"] == "mean":
        items = case.options.get("num_items")
        weight = weight / (max(int(counted.sum()), 1) if items is None else float(items))
    return weight


def _upstream(case: Case, rows: int, dtype: torch.dtype) -> Tensor:
    up = case.upstream
    if isinstance(up, float):
        return torch.full((rows,), up, dtype=dtype)
    if case.options["shift"]:
        up = torch.nn.functional.pad(up, (0, 1))
    return up.reshape(-1).to(dtype)


def _row(case: Case, row: int, s: Tensor, dtype: torch.dtype) -> tuple[Tensor, float, dict[str, Tensor]]:
    """A row's loss before its weight, the size of its gradient's terms, and its parts."""
    o = case.options
    tau, kd_w, ce_w = (_number(o[name], row, dtype) for name in ("temperature", "kd_weight", "ce_weight"))
    index = _label_index(case)
    label = None if index is None else int(index[row])
    probs = _label_probs(case, row, dtype)
    kd = _kd(case, row, s, tau, label, dtype)
    ce = oracle.cross_entropy(s, label, probs, o["label_smoothing"])
    t2 = float(tau) ** 2 if o["scale_by_t2"] and case.divergence.name != "logit_mse" else 1.0
    terms = [(float(kd_w) * t2, kd), (float(ce_w), ce), (o["z_weight"], oracle.z_loss(s))]
    loss = torch.zeros((), dtype=dtype)
    for coefficient, value in terms:
        if coefficient:
            loss = loss + coefficient * value
    size = abs(float(kd_w)) * t2 / min(float(tau), 1.0) + abs(float(ce_w)) + o["z_weight"] * 10
    with torch.no_grad():
        shared = s[: min(case.columns, case.teacher_columns)]
        return loss, size, {"kd": kd, "ce": ce, "entropy": oracle.entropy(shared, tau)}


def _label_probs(case: Case, row: int, dtype: torch.dtype) -> Tensor | None:
    if case.labels is None or not case.labels.is_floating_point():
        return None
    labels = case.labels.roll(-1, -2) if case.options["shift"] else case.labels
    return labels.reshape(-1, case.columns)[row].to(dtype)


def _kd(case: Case, row: int, s: Tensor, tau: Tensor, label: int | None, dtype: torch.dtype) -> Tensor:
    o, div = case.options, case.divergence
    tau_t = tau if o["teacher_temperature"] is None else torch.tensor(o["teacher_temperature"], dtype=dtype)
    s = s[: case.teacher_columns]
    if case.teacher_kind in ("logits", "dense", "head", "hidden"):
        t = case.teacher_logits if case.teacher_head is None else _teacher_logits(case, dtype)
        t = t.reshape(-1, case.teacher_columns)[row].to(dtype)[: case.columns]
        return oracle.dense_row(div, s, t, tau, tau_t, label)
    entries, tail = _entries(case, row, o["teacher_temperature"])
    if case.teacher_kind != "prototype":
        return oracle.sparse_row(s, entries, tail, div.name == "forward_kl", tau)
    e = case.teacher_entries
    p = e.prototypes[e.prototype_ids[row]].to(dtype)
    rest = torch.ones(len(p), dtype=torch.bool)
    rest[list(entries)] = False
    p = torch.where(rest, p * (tail / float(p[rest].double().sum())), 0.0)
    for column, w in entries.items():
        p[column] = w
    return oracle.dense_row(div, s, p.log(), tau, torch.ones((), dtype=dtype), label)


def _teacher_logits(case: Case, dtype: torch.dtype) -> Tensor:
    return _head_logits({k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.teacher_head.items()})


def _entries(case: Case, row: int, tau: float) -> tuple[dict[int, float], float | None]:
    """A row's entries as one weight for each column, and the rest's probability, at one of the labels' temperatures."""
    e = case.teacher_entries
    columns: dict[int, float] = {}
    if case.teacher_kind == "weights":
        for column, w in zip(e.ids[row], e.values[row], strict=True):
            if w:
                columns[column] = columns.get(column, 0.0) + w
        return columns, None
    log_tail = e.log_tails[e.temperatures.index(tau)][row]
    tail = math.exp(log_tail)
    for column, x in zip(e.ids[row], e.values[row], strict=True):
        w = math.exp(x / tau) if case.teacher_kind == "topk" else x
        if w:
            columns[column] = w
    total = sum(columns.values())
    return {c: w / total * (1.0 - tail) for c, w in columns.items() if w * (1.0 - tail)}, tail


# ---- comparison -----------------------------------------------------------------------------------------------------


def check(case: Case) -> str | None:
    """What is wrong with kd_loss in this case, or None."""
    got = case.call()
    loss, parts = got if case.options["return_parts"] else (got, None)
    exact, exact_grads, exact_parts, counted, size = truth(case, torch.float64)
    rough, rough_grads, _, _, _ = truth(case, torch.float32)
    wide = torch.float64 if _student_dtype(case) == torch.float64 else torch.float32
    unit = 1e-10 if wide == torch.float64 and case.teacher_kind in ("logits", "dense") else 1e-5
    ours = _reduce_grad(case, loss)
    if not torch.isfinite(exact).all():
        return _check_infinite(case, loss, exact, counted, ours)
    largest = max(float(g.abs().max()) if g.numel() else 0.0 for g in exact_grads)
    if largest > torch.finfo(_student_dtype(case)).max or (wide == torch.float32 and float(exact.max()) > 1e30):
        return None  # beyond what the dtype, or float32 on the way, can hold
    # A gradient's entries are differences of terms as large as the loss.
    in_head = 0.0
    if case.student_head is not None:  # each product is of a rounded gradient and a weight
        in_head = 4 * case.columns * max(1.0, float(case.student_head["weight"].detach().abs().max())) ** 2
    fault = _compare_loss(case, loss.detach().double(), exact, rough, unit)
    for name, mine, right, eager in zip(("student", "weight", "bias"), ours, exact_grads, rough_grads, strict=False):
        if fault is None:
            fault = _compare_grad(
                name, mine, right, eager, unit, max(largest * bool(in_head), float(exact.abs().max())), size, in_head
            )
    if fault is None and parts is not None:
        fault = _compare_parts(case, parts, exact_parts)
    return fault


def _student_dtype(case: Case) -> torch.dtype:
    return case.student_logits.dtype if case.student_head is None else case.student_head["hidden"].dtype


def _reduce_grad(case: Case, loss: Tensor) -> list[Tensor]:
    if isinstance(case.upstream, Tensor):
        loss.backward(case.upstream.to(loss.dtype))
    else:
        (loss * case.upstream).backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in case.leaves]


def _check_infinite(case: Case, loss: Tensor, exact: Tensor, counted: Tensor, grads: list[Tensor]) -> str | None:
    if case.options["reduction"] != "none":
        total = float(exact.sum())
        got = float(loss.detach())
        same = got == total or (math.isnan(got) and math.isnan(total))
        return None if same else f"loss {got}, wanted {total}"
    ours = loss.detach().reshape(-1)
    wanted = exact.reshape(case.shape)[..., :-1].reshape(-1) if case.options["shift"] else exact
    infinite = torch.isinf(wanted)
    if not torch.equal(ours[infinite].double(), wanted[infinite]):
        return f"losses {ours.tolist()}, wanted {wanted.tolist()}"
    if case.student_head is None and (grads[0][case.student_logits == -math.inf] != 0).any():
        return "a gradient at a masked column of a row whose divergence is infinite"
    return None


def _compare_loss(case: Case, loss: Tensor, exact: Tensor, rough: Tensor, unit: float) -> str | None:
    if case.options["reduction"] == "none":
        exact, rough = exact.reshape(case.shape), rough.reshape(case.shape)
        if case.options["shift"]:
            exact, rough = exact[..., :-1], rough[..., :-1]
    else:
        exact, rough = exact.sum(), rough.sum()
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    allowed = 4 * float(_error_in_float32(rough, exact, unit)) + 4 * unit * max(scale, 1.0)
    error = float((loss - exact).abs().max())
    return (
        None
        if error <= allowed
        else f"loss {loss.tolist()}, wanted {exact.tolist()} (error {error:.3g} > {allowed:.3g})"
    )


def _compare_grad(
    name: str, ours: Tensor, exact: Tensor, rough: Tensor, unit: float, least: float, size: Tensor, in_head: float
) -> str | None:
    """``in_head``: the square of how much the rounding of logits' gradients may weigh in an entry, 0 without a head."""
    if not ours.numel():
        return None
    scale = max(float(exact.abs().max()), float(size.max()) if size.numel() else 0.0, least)
    narrow = torch.finfo(ours.dtype)
    rounding = narrow.eps * (scale * in_head**0.5 if in_head else exact.abs())
    allowed = unit * scale + 4 * _error_in_float32(rough, exact, unit)
    allowed = allowed + rounding + narrow.smallest_normal
    error = (ours.double() - exact).abs()
    if bool((error <= allowed).all()):
        return None
    worst = int((error - allowed).argmax())
    return (
        f"gradient of the {name}: {float(ours.reshape(-1)[worst]):.9g} at {worst}, wanted "
        f"{float(exact.reshape(-1)[worst]):.9g} (largest {scale:.3g})"
    )


def _error_in_float32(rough: Tensor, exact: Tensor, unit: float) -> Tensor:
    """What the formulas themselves lose in float32, where that is what is compared and can hold them."""
    error = (rough.double() - exact).abs().max()
    return error if unit >= 1e-6 and bool(torch.isfinite(error)) else torch.zeros((), dtype=torch.float64)


def _compare_parts(case: Case, parts: Any, exact: dict[str, Tensor]) -> str | None:
    weighs = _weighs(case)
    for name, values in exact.items():
        ours = getattr(parts, name).double()
        if case.options["reduction"] == "none":
            right = torch.where(weighs, values, 0.0).reshape(case.shape)
            right = right[..., :-1] if case.options["shift"] else right
        else:
            right = values[weighs].sum() / max(int(weighs.sum()), 1)
        finite = torch.isfinite(right)
        if not torch.allclose(ours[finite], right[finite], rtol=1e-3, atol=1e-3):
            return f"parts.{name} {ours.tolist()}, wanted {right.tolist()}"
    return None


def _weighs(case: Case) -> Tensor:
    """The rows that weigh something in the loss: parts are theirs."""
    rows = range(math.prod(case.shape))
    names = ("kd_weight", "ce_weight", "z_weight")
    terms = [any(float(_number(case.options[name], row, torch.float64)) for name in names) for row in rows]
    return torch.tensor(terms) & (_row_weight(case) != 0.0) & _counted(case)


def run(seed: int, cases: int | None, seconds: float | None) -> tuple[int, list[dict[str, Any]], Counter[str]]:
    """Check cases until either is used up: how many, those that failed, and how many there were of each sort."""
    failures, sorts, number, started = [], Counter(), 0, time.monotonic()
    while (cases is None or number < cases) and (seconds is None or time.monotonic() - started < seconds):
        case = draw(seed, number)
        sorts[f"{case.teacher_kind}: {case.divergence.name}"] += 1
        try:
            fault = check(case)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        if fault is not None:
            failures.append({"seed": seed, "number": number, "about": case.about, "fault": fault})
            print(f"seed {seed} case {number}: {case.about}\n  {fault}", flush=True)
        number += 1
    return number, failures, sorts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=101)
    parser.add_argument("--only", type=int, help="run one case and show its options")
    parser.add_argument("--json", type=Path, help="write the counts and the failures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only is not None:
        case = draw(args.seed, args.only)
        print(case.about, case.options, f"labels {case.labels}", sep="\n")
        print(check(case) or "right")
        return 0
    if args.cases is None and args.seconds is None:
        parser.error("--cases or --seconds is needed")
    cases, failures, sorts = run(args.seed, args.cases, args.seconds)
    if args.json is not None:
        args.json.write_text(json.dumps({"cases": cases, "failures": failures, "sorts": dict(sorts)}, indent=1))
    print(f"{cases} cases, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
