"""The students as a table and a curve: python benchmarks/frontier/report.py

Differences from dense KD are paired by seed. An arm is as good as dense KD if the upper end of its 95 % interval lies
below the margin: 5 % of the gap between no KD and dense KD, a choice made before the first student was trained.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MARGIN = 0.05
HEADING = """# Bytes per token against the student they train

Teacher: SmolLM2-135M (49,152 columns) on the standard library's help topics. Student: a Llama of 6.9 M parameters on
40,960 of these tokens, for as many epochs as the headings say; held-out KL(teacher, student) on 16,896 others, in nats.
Bytes are those of the labels; a table of 256 prototypes takes 12.6 MB more (64: 3.2 MB, 1024: 50.6 MB), whatever the
cache's size, and the files' headers and keys 0.3 B per token. `dense`: the teacher's whole distributions. `topk` is
not entropy-coded. `fresh`: drawn anew for every epoch. Differences from dense KD are paired by seed, with 95 %
intervals. As good as dense KD: the interval ends below 5 % of the gap between no KD and dense KD, a margin that was
declared before the first student was trained."""
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Result:
    """The students of one arm after the same number of epochs."""

    arm: str
    kl: float  # held-out KL(teacher, student), mean over seeds, nats
    difference: float | None  # from dense KD, paired by seed
    interval: float | None  # half of the 95 % interval of ``difference``
    seeds: int
    bytes_per_token: float | None
    entries_per_token: float | None
    as_good: bool | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    folder = parser.parse_args().results
    rows = [json.loads(line) for line in (folder / "frontier-students.jsonl").read_text().splitlines()]
    by_epochs = {epochs: summarise([r for r in rows if r["epochs"] == epochs]) for epochs in epochs_of(rows)}
    text = "\n\n".join(f"## {named(epochs)}\n\n{table(results)}" for epochs, results in by_epochs.items())
    where = [", ".join(sorted({str(row[name]) for row in rows})) for name in ("commit", "torch", "processor")]
    about = f"{len(rows)} students; commits {where[0]}; torch {where[1]}; {where[2]}"
    (folder / "frontier.md").write_text(f"{HEADING}\n\n{text}\n\n{about}\n")
    plot(by_epochs, folder / "frontier.png")
    print(text)


def named(epochs: int) -> str:
    return f"{epochs} epoch{'s' if epochs > 1 else ''}"


def epochs_of(rows: list[dict]) -> list[int]:
    return sorted({row["epochs"] for row in rows})


def summarise(rows: list[dict]) -> list[Result]:
    """The arms' results, in the order of their held-out KL, the best first."""
    kl: dict[str, dict[int, float]] = defaultdict(dict)
    last: dict[str, dict] = {}
    for row in rows:
        kl[row["arm"]][row["seed"]], last[row["arm"]] = row["kl"], row
    gap = mean(kl["none"]) - mean(kl["dense"]) if kl["none"] and kl["dense"] else math.nan
    results = [_result(arm, kl[arm], kl["dense"], gap, last[arm]) for arm in last]
    return sorted(results, key=lambda result: result.kl)


def _result(arm: str, kl: dict[int, float], dense: dict[int, float], gap: float, row: dict) -> Result:
    paired = np.array([kl[seed] - dense[seed] for seed in kl if seed in dense])
    difference = float(paired.mean()) if len(paired) else None
    interval = half_interval(paired)
    as_good = None if interval is None or arm == "dense" else bool(difference + interval < MARGIN * gap)
    return Result(
        arm,
        mean(kl),
        difference,
        interval,
        len(kl),
        row.get("bytes_per_token"),
        row.get("entries_per_token"),
        as_good,
    )


def half_interval(paired: np.ndarray) -> float | None:
    """Half of the 95 % interval of the mean of paired differences; None of less than two."""
    if len(paired) < 2:
        return None
    return T95[min(len(paired) - 1, max(T95))] * float(paired.std(ddof=1)) / math.sqrt(len(paired))


def mean(kl: dict[int, float]) -> float:
    return float(np.mean(list(kl.values())))


def table(results: list[Result]) -> str:
    lines = [
        "| labels | entries/token | bytes/token | held-out KL | KL - dense KD, paired | as good as dense KD | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        entries = "" if r.entries_per_token is None else f"{r.entries_per_token:.1f}"
        size = "" if r.bytes_per_token is None else f"{r.bytes_per_token:.1f}"
        apart = "" if r.difference is None else f"{r.difference:+.3f}"
        apart += "" if r.interval is None else f" ± {r.interval:.3f}"
        verdict = "" if r.as_good is None else "yes" if r.as_good else "no"
        lines.append(f"| {r.arm} | {entries} | {size} | {r.kl:.3f} | {apart} | {verdict} | {r.seeds} |")
    return "\n".join(lines)


FAMILIES = {"prototype": "tab:green", "sample": "tab:blue", "threshold": "tab:orange", "topk": "tab:red"}
SHOWN = 0.2  # of the gap between no KD and dense KD: arms above are marked at the upper edge


def plot(by_epochs: dict[int, list[Result]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(by_epochs), figsize=(6.5 * len(by_epochs), 5), squeeze=False)
    for axis, (epochs, results) in zip(axes[0], by_epochs.items(), strict=True):
        _panel(axis, results)
        axis.set(title=named(epochs), xlabel="bytes per token, table of prototypes apart")
    axes[0, 0].set_ylabel("held-out KL(teacher, student) above dense KD's, nats")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, results: list[Result]) -> None:
    kl = {r.arm: r.kl for r in results}
    gap = kl.get("none", math.nan) - kl.get("dense", math.nan)
    axis.axhline(0, color="black", linewidth=1, label="dense KD")
    axis.axhline(MARGIN * gap, color="black", linewidth=1, linestyle=":", label=f"margin: {MARGIN:.0%} of the gap")
    shown = [
        r.difference + (r.interval or 0) for r in results if r.difference is not None and r.difference < SHOWN * gap
    ]
    upper = max(1.1 * max(shown, default=0), 2 * MARGIN * gap)
    lower = 1.1 * min((r.difference - (r.interval or 0) for r in results if r.difference is not None), default=0)
    outside = 0
    for family, colour in FAMILIES.items():
        label = family
        for r in results:
            if not r.arm.startswith(family) or r.bytes_per_token is None or r.difference is None:
                continue
            beyond = r.difference > SHOWN * gap
            outside += beyond
            y = (1 - 0.04 * outside) * upper if beyond else r.difference
            marker = "^" if beyond else "o" if not r.arm.endswith("-fresh") else "D"
            error = None if beyond else r.interval
            named = label if marker != "D" else None
            axis.errorbar(r.bytes_per_token, y, error, fmt=marker, color=colour, label=named, capsize=2, markersize=5)
            label = label if named is None else None
            dy = -9 if "-of-" in r.arm or marker == "D" else 4
            note = r.arm.removeprefix(family).strip("-") + (f" (+{r.difference:.2f})" if beyond else "")
            axis.annotate(note, (r.bytes_per_token, y), xytext=(5, dy), textcoords="offset points", fontsize=7)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axis.minorticks_off()
    axis.set_xlim(0.9, 50)
    axis.set_ylim(min(lower, -0.1 * upper), upper)


if __name__ == "__main__":
    main()
