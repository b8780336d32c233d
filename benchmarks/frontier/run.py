"""Bytes per token against the student they train: python benchmarks/frontier/run.py --out output/frontier

Trains one small Llama per arm, seed and number of epochs, and appends each one's held-out KL to ``students.jsonl``.
Interrupt it at will: the next call resumes with what is missing. Two runs may share a folder. The teacher takes two
minutes, a student 15 seconds per epoch and core. MALLOC_MMAP_THRESHOLD_=8000000000 and
MALLOC_TRIM_THRESHOLD_=16000000000 in the environment save a fifth of that.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from arms import ARMS
from labels import Labels, make_labels
from student import Teacher, evaluate, train
from teacher import HELD_OUT_WINDOWS, Corpus, load

from kdfast.bench.report import environment


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    corpus = load(options.out)
    results = options.results / "frontier-students.jsonl"
    for seed in options.seeds:
        for epochs in options.epochs:
            for name in options.arms:
                if (name, seed, epochs, repr(ARMS[name])) not in _done(results):
                    row = _student(corpus, options.out, name, seed, epochs)
                    results.parent.mkdir(parents=True, exist_ok=True)
                    with results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)


def _student(corpus: Corpus, folder: Path, name: str, seed: int, epochs: int) -> dict[str, object]:
    teacher, labels = _teacher(corpus, folder, name, seed, epochs)
    start = time.time()
    student = train(corpus, teacher, epochs, seed)
    seconds = time.time() - start
    row: dict[str, object] = {"arm": name, "seed": seed, "epochs": epochs, "labels": repr(ARMS[name])}
    row |= evaluate(student, corpus, HELD_OUT_WINDOWS)
    if labels is not None:
        row["bytes_per_token"] = labels.bytes_per_token
        row["entries_per_token"] = labels.entries_per_token
        row["model_bytes"] = labels.model_bytes
    about = environment()
    return row | {"seconds": round(seconds), **{name: about[name] for name in ("date", "commit", "torch", "processor")}}


def _teacher(corpus: Corpus, folder: Path, name: str, seed: int, epochs: int) -> tuple[Teacher, Labels | None]:
    if name == "none":
        return lambda windows, epoch: None, None
    if name == "dense":
        return lambda windows, epoch: corpus.logits(torch.tensor(windows)), None
    if not ARMS[name].fresh:
        labels = make_labels(corpus, folder, name, seed)
        return lambda windows, epoch: labels.at(windows), labels
    draws = [make_labels(corpus, folder, name, 1000 * (epoch + 1) + seed) for epoch in range(epochs)]
    return lambda windows, epoch: draws[epoch].at(windows), draws[0]


def _done(results: Path) -> set[tuple[str, int, int, str]]:
    """The students that are there, each with the labels of its arm, which older lines do not say."""
    if not results.exists():
        return set()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    return {(row["arm"], row["seed"], row["epochs"], row.get("labels", repr(ARMS.get(row["arm"])))) for row in rows}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/frontier"), help="what can be made again")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 1, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
