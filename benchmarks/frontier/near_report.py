"""The near students as tables and curves: python benchmarks/frontier/near_report.py

The share of dense KD's gain that labels lose against their bytes per token, one panel per distance, and the students
from scratch of ``frontier-students.jsonl`` as the farthest one. Margins: see ``near.py``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distances import DISTANCES
from near import RESULTS
from near_train import UNTRAINED
from report import FAMILIES, half_interval

# At most so many bytes per token, and the share of dense KD's gain that may be lost.
MARGINS = ((4.0, 0.01), (14.0, 0.003))
FAR = "students from scratch (a Llama of 6.9 M parameters), 4 epochs"
FAR_EPOCHS = 4
HEADING = """# Bytes per token against the student they train, near the teacher

Students start from their teacher's own weights, damaged as practice damages them, and are healed by distillation from
stored labels: SmolLM2-135M (49,152 columns) and Gemma-3-270M (262,144) on the standard library's help topics, each
window once. Lost: (KL - KL of dense KD) / (KL at the start - KL of dense KD), held-out KL(teacher, student) in nats,
paired by seed, with 95 % intervals; above 100 % the labels do harm. `none`: the text alone, no KD.

Bytes are those of the labels; a table of 256 prototypes, learned from the windows that are trained on, takes 12.6 MB
more (Gemma: 67 MB), whatever the cache's size, and the files' headers and keys 0.3 B per token. Margins, declared
before the first student was trained: 1 % at up to 4 bytes per token, .3 % at up to 14; within: the interval ends below
it. The students from scratch are not healed but trained: their start is that without KD, `none`."""


@dataclass(frozen=True)
class Result:
    """The students of one arm at one distance."""

    arm: str
    kl: float  # mean over seeds
    ce: float
    lost: float | None  # share of dense KD's gain, mean over pairs
    interval: float | None  # half of the 95 % interval of ``lost``
    seeds: int
    bytes_per_token: float | None

    @property
    def within(self) -> bool | None:
        """Whether the margin for so many bytes holds; None where there is none, or too few seeds to say."""
        if self.bytes_per_token is None or self.lost is None or self.interval is None:
            return None
        margins = [margin for most, margin in MARGINS if self.bytes_per_token <= most]
        return self.lost + self.interval < margins[0] if margins else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    folder = parser.parse_args().results
    rows = _rows(folder / RESULTS)
    sections, panels = [], {}
    for name, distance in DISTANCES.items():
        chosen = _current([row for row in rows if row["distance"] == name])
        if any(row["arm"] == "dense" for row in chosen):
            results, start = summarise(chosen)
            panels[f"{distance.title}: KL {start:.3g}"] = results
            sections.append(f"## {distance.title}: KL {start:.4f} at the start\n\n{table(results)}")
    far = [row for row in _rows(folder / "frontier-students.jsonl") if row["epochs"] == FAR_EPOCHS]
    if far:
        panels[FAR], _ = summarise(far, untrained="none")
        sections.append(f"## {FAR}\n\n{table(panels[FAR], margins=False)}")
    where = [", ".join(sorted({str(row[name]) for row in rows})) for name in ("commit", "torch", "processor")]
    about = f"{len(rows)} near students; commits {where[0]}; torch {where[1]}; {where[2]}"
    text = "\n\n".join([HEADING, *sections, about])
    (folder / "frontier-near.md").write_text(text + "\n")
    plot(panels, folder / "frontier-near.png")
    print("\n\n".join(sections))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _current(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The students of the setting that has most of them: earlier tries with another one are no pairs."""
    count: dict[str, int] = defaultdict(int)
    for row in rows:
        count[row["setting"]] += 1
    return [row for row in rows if row["setting"] == max(count, key=lambda setting: count[setting])]


def summarise(rows: list[dict[str, Any]], untrained: str = UNTRAINED) -> tuple[list[Result], float]:
    """The arms' results, by bytes per token, and the KL at the start."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["seed"]] = row
    start = float(np.mean([row["kl"] for row in by_arm[untrained].values()]))
    dense = {seed: row["kl"] for seed, row in by_arm["dense"].items()}
    results = [_result(arm, by_seed, dense, start) for arm, by_seed in by_arm.items()]
    return sorted(results, key=lambda r: (r.bytes_per_token is not None, r.bytes_per_token or r.kl)), start


def _result(arm: str, by_seed: dict[int, dict[str, Any]], dense: dict[int, float], start: float) -> Result:
    gain = start - float(np.mean(list(dense.values())))
    pairs = np.array([row["kl"] - dense[seed] for seed, row in by_seed.items() if seed in dense]) / gain
    lost = interval = None
    if len(pairs) and arm not in ("dense", UNTRAINED):
        lost, interval = float(pairs.mean()), half_interval(pairs)
    kl, ce = (float(np.mean([row[name] for row in by_seed.values()])) for name in ("kl", "ce"))
    size = next((row["bytes_per_token"] for row in by_seed.values() if "bytes_per_token" in row), None)
    return Result(arm, kl, ce, lost, interval, len(by_seed), size)


def table(results: list[Result], margins: bool = True) -> str:
    lines = [
        "| labels | bytes/token | held-out KL | lost of dense KD's gain | within the margin | cross-entropy | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        size = "" if r.bytes_per_token is None else f"{r.bytes_per_token:.1f}"
        lost = "" if r.lost is None else f"{100 * r.lost:.2f} %"
        lost += "" if r.interval is None else f" ± {100 * r.interval:.2f}"
        within = "" if r.within is None or not margins else "yes" if r.within else "no"
        lines.append(f"| {r.arm} | {size} | {r.kl:.4f} | {lost} | {within} | {r.ce:.3f} | {r.seeds} |")
    return "\n".join(lines)


COLOURS = {**FAMILIES, "systematic": "tab:purple"}
SHOWN = (0.0005, 3.0)  # the axis of shares lost; what lies outside is drawn at its edge
COLUMNS = 3


def plot(panels: dict[str, list[Result]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    high = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(high, COLUMNS, figsize=(5.2 * COLUMNS, 4 * high), squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, results) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, results, () if title == FAR else MARGINS)
        axis.set_title(title, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of dense KD's gain lost")
    axes.flat[len(panels) - 1].set_xlabel("bytes per token, table of prototypes apart")
    axes[0, 0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, results: list[Result], margins: Sequence[tuple[float, float]]) -> None:
    left = 0.9
    for most, margin in margins:
        axis.plot([left, most], [margin, margin], color="black", linewidth=1, linestyle=":")
        left = most
    axis.axhline(1, color="grey", linewidth=0.7)
    named = set()
    for r in results:
        family = next((name for name in COLOURS if r.arm.startswith(name)), None)
        if family is None or r.bytes_per_token is None or r.lost is None:
            continue
        y = min(max(r.lost, SHOWN[0]), SHOWN[1])
        marker = "o" if y == r.lost else "v" if y > r.lost else "^"
        error = None
        if r.interval is not None and marker == "o":
            error = [[min(r.interval, y - SHOWN[0])], [r.interval]]
        label = None if family in named else family
        named.add(family)
        axis.errorbar(
            r.bytes_per_token, y, error, fmt=marker, color=COLOURS[family], label=label, capsize=2, markersize=5
        )
        note = r.arm.removeprefix(family).strip("-")
        axis.annotate(note, (r.bytes_per_token, y), xytext=(5, 3), textcoords="offset points", fontsize=7)
    axis.set(xscale="log", yscale="log", xlim=(0.9, 110), ylim=(SHOWN[0] * 0.8, SHOWN[1] * 1.2))
    axis.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    axis.minorticks_off()
    shares = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
    axis.set_yticks(shares, [f"{100 * share:g} %" for share in shares])


if __name__ == "__main__":
    main()
