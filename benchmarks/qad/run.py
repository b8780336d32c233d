"""Quantised and pruned students, healed from labels of several sizes: python benchmarks/qad/run.py --out output/qad

Rounds SmolLM2-135M's weights or drops some of its layers, trains the student from each kind of labels, and appends its
held-out KL and cross-entropy to ``qad-students.jsonl``. Labels come from a cache that is written first, as any would
be. Interrupt it at will: the next call goes on with what is missing. A student takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from students import STUDENTS, Plan, damaged, evaluate, heal
from torch import Tensor

from kdfast import SoftLabels, cache
from kdfast.bench.report import environment
from kdfast.bench.teacher import Corpus, load_teacher

# In the order in which students are trained. "start": not at all. "ce": from the text alone.
ARMS: dict[str, dict[str, Any] | None] = {
    "start": None,
    "dense": None,
    "sample-23": {"codec": "sample", "draws": 23},
    "sample-10": {"codec": "sample", "draws": 10},
    "prototype-3": {"codec": "prototype", "k": 3},
    "ce": None,
}
KEYS = ("student", "arm", "seed", "windows", "rate")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    os.environ["TQDM_DISABLE"] = "1"  # bars of the model's loading
    corpus = load_teacher(options.out / "teacher.safetensors")
    results = options.results / "qad-students.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for student in options.students:
            for arm in options.arms:
                plan = Plan(0, 0.0, 0) if arm == "start" else Plan(options.windows, options.rate, seed)
                about = {"student": student, "arm": arm, "seed": plan.seed, "windows": plan.windows, "rate": plan.rate}
                if tuple(about.values()) in _done(results):
                    continue
                row = about | _healed(corpus, options.out, student, arm, plan, options.held_out)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def _healed(corpus: Corpus, folder: Path, student: str, arm: str, plan: Plan, held_out: int) -> dict[str, Any]:
    row: dict[str, Any] = {"held_out_windows": held_out}
    teacher = _teacher(corpus, folder, arm, plan, row)
    start = time.time()
    torch.manual_seed(plan.seed)
    model = damaged(STUDENTS[student])
    if plan.windows:
        heal(model, corpus, teacher, plan)
    row |= evaluate(model, corpus, held_out)
    about = environment()
    return row | {
        "seconds": round(time.time() - start),
        **{name: about[name] for name in ("date", "commit", "torch", "processor")},
    }


def _teacher(
    corpus: Corpus, folder: Path, arm: str, plan: Plan, row: dict[str, Any]
) -> Callable[[Tensor], Tensor | SoftLabels | None]:
    """What an arm's students learn from, of the windows of a batch. Where that is a cache, ``row`` gets its size."""
    stored = ARMS[arm]
    if stored is None:
        return corpus.logits if arm == "dense" else lambda batch: None
    reader = cache.open(_capture(corpus, folder, arm, stored, plan))
    row["bytes_per_token"] = reader.nbytes / (plan.windows * corpus.ids.shape[1])
    return lambda batch: SoftLabels.cat([reader[key] for key in batch.tolist()])


def _capture(corpus: Corpus, folder: Path, arm: str, stored: dict[str, Any], plan: Plan) -> Path:
    drawn = {"seed": plan.seed} if stored["codec"] == "sample" else {}
    path = folder / "caches" / "-".join([arm, str(plan.windows), *map(str, drawn.values())])
    cache.capture(
        lambda windows: corpus.logits(windows).unflatten(0, (len(windows), -1)),
        torch.arange(plan.windows).split(8),
        path,
        vocab_size=corpus.vocab_size,
        key=lambda windows: windows,
        teacher="SmolLM2-135M",
        progress=False,
        **stored,
        **drawn,
    )
    return path


def _done(results: Path) -> set[tuple[Any, ...]]:
    if not results.exists():
        return set()
    return {tuple(json.loads(line)[name] for name in KEYS) for line in results.read_text().splitlines()}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/qad"), help="what can be made again")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--windows", type=int, default=32, help="of 256 tokens, each once")
    parser.add_argument("--held-out", type=int, default=16, help="windows")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", default=["mxfp4", "int4-32"], choices=list(STUDENTS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
