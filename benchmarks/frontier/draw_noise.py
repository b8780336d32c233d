"""The noise of N draws: python benchmarks/frontier/draw_noise.py --out output/near

What a student's layers see of labels q is the gradient W^T (p - q) at the last hidden state, W being the output layer.
Prints the variance of W^T q over redraws, mean over 1,024 rows of SmolLM2-135M, as that of so many independent draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from kdfast.bench.teacher import LENGTH, load_teacher
from kdfast.cache.selection.select import Drawn, sample

ROWS, REDRAWS = 1024, 6
DRAWS = (2, 3, 5, 8, 10, 14, 23, 30, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("output/near"), help="where teacher.safetensors is, or is made"
    )
    corpus = load_teacher(parser.parse_args().out / "teacher.safetensors")
    rows = torch.randperm(corpus.train * LENGTH, generator=torch.Generator().manual_seed(0))[:ROWS]
    logits = corpus.logits_of(rows)
    weight = corpus.head.float() - corpus.head.float().mean(0)
    probs = logits.softmax(1)
    mean = probs @ weight
    one = float(((probs @ (weight * weight).sum(1)) - (mean * mean).sum(1)).mean())  # of a single draw
    print("| draws | independent: entries, worth | systematic: entries, worth |\n|---|---|---|")
    for draws in DRAWS:
        cells = (noise(logits, weight, mean, draws, systematic) for systematic in (False, True))
        print(f"| {draws} | " + " | ".join(f"{entries:.1f}, {one / found:.1f}" for entries, found in cells) + " |")


def noise(logits: Tensor, weight: Tensor, mean: Tensor, draws: int, systematic: bool) -> tuple[float, float]:
    """Entries per row, and the variance of W^T q."""
    entries = found = 0.0
    for seed in range(REDRAWS):
        drawn: Drawn = sample(logits, temperature=1.0, draws=draws, systematic=systematic, seed=seed)
        row = torch.repeat_interleave(drawn.counts.long())
        share = drawn.draws / draws
        estimate = torch.zeros_like(mean).index_add(0, row, weight[drawn.ids.long()] * share[:, None])
        found += float(((estimate - mean) ** 2).sum(1).mean()) / REDRAWS
        entries += len(drawn.ids) / len(logits) / REDRAWS
    return entries, found


if __name__ == "__main__":
    main()
