"""Learning curves as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdfast.demo.arms import UPPER_BOUND
from kdfast.demo.experiment import OWN_TEACHER, TEACHER, Result, Runs

__all__ = ["plot"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#CC79A7", "#0072B2", "#009E73", "#999999")
# Dashes where curves may coincide, as those of KD from a teacher of the same labels and of no KD do.
STYLES = {"kd_own": (0, (4, 4)), UPPER_BOUND: "--"}


def plot(result: Result, path: Path) -> None:
    """Plot the test accuracy of each arm by epoch, as a PNG: mean over the seeds, and a band of one std."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    axes = figure.add_subplot()
    students = {name: runs for name, runs in result.runs.items() if name not in (TEACHER, OWN_TEACHER)}
    for (name, runs), colour in zip(students.items(), COLOURS, strict=True):
        _band(axes, runs, colour, STYLES.get(name, "-"))
    teacher = result.runs[TEACHER]
    level = 100 * teacher.scores[0]["accuracy"]
    axes.axhline(level, color="#D55E00", ls=":", lw=1.5, label=f"{teacher.title} ({level:.1f})")
    _label(axes, result)
    figure.savefig(path, dpi=150)


def _band(axes: Axes, runs: Runs, colour: str, style: Any) -> None:
    curves = 100 * torch.tensor([fit.curve for fit in runs.fits])
    mean, std = curves.mean(0), curves.std(0) if len(curves) > 1 else torch.zeros(curves.shape[1])
    epochs = range(1, curves.shape[1] + 1)
    axes.plot(epochs, mean, ls=style, color=colour, lw=1.8, label=f"{runs.title} ({mean[-1]:.1f} ± {std[-1]:.1f})")
    axes.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.13, lw=0)


def _label(axes: Axes, result: Result) -> None:
    s = result.settings
    axes.set_xlabel(f"epoch ({s.student.steps_per_epoch} steps of up to {s.student.batch} images)")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Digits 8 x 8, student 64-16-10, {s.labelled} labelled images: mean ± std over {s.seeds} seeds")
    axes.set_xlim(1, s.student.epochs)
    axes.set_ylim(60, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=True, fontsize=9)
