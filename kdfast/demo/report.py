"""The results, as tables for the terminal and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table

import kdfast
from kdfast.demo.arms import BASELINE, UPPER_BOUND
from kdfast.demo.experiment import OWN_TEACHER, TEACHER, Result, Runs
from kdfast.demo.metrics import METRICS
from kdfast.demo.speed import SOURCES

__all__ = ["figures", "notes", "summary", "tables", "write_json"]


def summary(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation of some values, with n - 1; 0 for a single value."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def notes(result: Result) -> list[str]:
    """Sentences on what a reader must know before quoting a number."""
    s = result.settings
    split = "validation part of the training split" if s.validation else "test split"
    return [
        f"The main teacher was trained on all {result.train_images} training labels: the two arms that read its cache "
        f"get knowledge that {s.labelled} labels do not hold. Label smoothing and the teacher that knows {s.labelled} "
        "labels are the controls: same labels, no more knowledge.",
        f"Mean ± standard deviation (n - 1) over {s.seeds} seeds, on {result.test_images} images of the {split}. A "
        "seed draws the labelled images, the initial weights and the batches. The split and the main teacher are the "
        "same for all seeds: their own spread is not in the ±.",
        "All students have one architecture, optimiser and number of steps; the last step's weights are scored. "
        "Settings were chosen on a part of the training split, never on the test split. The main teacher stops early: "
        "trained longer it scores higher, but tells its students less.",
        "The cache pays by what a teacher costs: this one is so small that running it may take no longer than looking "
        "its labels up batch by batch. Ten classes are also few: a record's key and place take more than its labels.",
    ]


# ---- terminal ----


def tables(result: Result) -> list[Table]:
    """Tables of accuracy, macro averages, throughput by source of labels, and cache size. Each fits 80 columns."""
    return [_accuracy(result), _macro(result), _speed(result), _cache(result)]


def _accuracy(result: Result) -> Table:
    def cells(name: str, runs: Runs) -> list[str]:
        gain = "" if name in (TEACHER, OWN_TEACHER, BASELINE) else _percent(_paired(result, runs), sign="+")
        return [_metric(runs, "accuracy"), gain, f"{runs.parameters:,}", f"{runs.throughput:,.0f}"]

    title = "Test accuracy, %, and training throughput"
    return _by_model(result, title, ["accuracy", "vs no KD", "params", "samples/s"], cells)


def _macro(result: Result) -> Table:
    names = [name for name in METRICS if name != "accuracy"]
    columns = [{"auc": "AUC", "f1": "F1"}.get(name, name) for name in names]
    return _by_model(result, "Macro averages, %", columns, lambda _, runs: [_metric(runs, name) for name in names])


def _by_model(result: Result, title: str, columns: list[str], cells: Callable[[str, Runs], list[str]]) -> Table:
    """One row per model: the teachers, the arms, the upper bound."""
    table = Table("model", title=title, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, runs in result.runs.items():
        if name in (BASELINE, UPPER_BOUND):
            table.add_section()
        table.add_row(runs.title, *cells(name, runs))
    return table


def _metric(runs: Runs, metric: str) -> str:
    return _percent(summary([score[metric] for score in runs.scores]))


def _percent(value: dict[str, float], sign: str = "") -> str:
    spread = f" ± {100 * value['std']:.1f}" if value["std"] else ""
    return f"{100 * value['mean']:{sign}.1f}{spread}"


def _speed(result: Result) -> Table:
    batch = result.settings.student.batch
    table = Table("teacher's labels", title=f"The student's training throughput, batch {batch}", show_edge=False)
    table.add_column("samples/s", justify="right")
    table.add_column("vs teacher in the loop", justify="right")
    for name, title in SOURCES.items():
        rate = result.throughput[name]
        table.add_row(title, f"{rate:,.0f}", f"{rate / result.throughput['live']:.2f} x")
    return table


def _cache(result: Result) -> Table:
    size = result.cache_size
    table = Table("bytes per sample", title="Cache", show_edge=False)
    table.add_column("bytes", justify="right")
    table.add_row("float32 logits", f"{size.float32:.1f}")
    table.add_row("cache, the labels", f"{size.payload:.1f}")
    table.add_row("cache, on disk: with keys, indices, checksums", f"{size.on_disk:.1f}")
    return table


def _paired(result: Result, runs: Runs) -> dict[str, float]:
    """Accuracy minus that of the student without KD, seed by seed."""
    pairs = zip(runs.scores, result.runs[BASELINE].scores, strict=True)
    return summary([ours["accuracy"] - base["accuracy"] for ours, base in pairs])


# ---- JSON ----


def write_json(result: Result, path: Path) -> None:
    """Write every number of a result as JSON."""
    path.write_text(json.dumps(figures(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def figures(result: Result) -> dict[str, Any]:
    """Every number of a result, with the versions, machine and settings that reproduce it."""
    return {
        "notes": notes(result),
        "versions": _versions(),
        "machine": _machine(result.settings.device),
        "settings": asdict(result.settings),
        "seeds": list(range(result.settings.seeds)),
        "images": {"train": result.train_images, "test": result.test_images},
        "models": {name: _model(result, name, runs) for name, runs in result.runs.items()},
        "throughput": {"unit": "samples/s", **result.throughput},
        "cache": {"path": result.cache.name, "bytes_per_sample": asdict(result.cache_size)},
    }


def _model(result: Result, name: str, runs: Runs) -> dict[str, Any]:
    values = {metric: [score[metric] for score in runs.scores] for metric in METRICS}
    return {
        "title": runs.title,
        "parameters": runs.parameters,
        "metrics": {metric: {**summary(v), "values": v} for metric, v in values.items()},
        "accuracy_minus_no_kd": None if name in (TEACHER, OWN_TEACHER) else _paired(result, runs),
        "train_samples_per_second": runs.throughput,
        "curves": [fit.curve for fit in runs.fits],
    }


def _versions() -> dict[str, str]:
    import matplotlib
    import sklearn
    import torchmetrics

    packages = {"kdfast": kdfast, "torch": torch, "scikit-learn": sklearn, "torchmetrics": torchmetrics}
    versions = {name: str(package.__version__) for name, package in packages.items()}
    return {"python": platform.python_version(), **versions, "matplotlib": matplotlib.__version__}


def _machine(device: str) -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_isa": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }
