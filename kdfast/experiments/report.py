"""The report: one HTML page with everything inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdfast.demo.plot import COLOURS as PALETTE
from kdfast.experiments.store import Run
from kdfast.experiments.summary import ArmSummary, LanguageRow, Summary, language_rows, summaries
from kdfast.experiments.tasks import CLEAN

__all__ = ["NoResultsError", "accuracy_figure", "html", "robustness_figure", "write_report"]

CLAIM = "few-labels-digits"
CLAIM_ARMS = ("no_kd", "smoothing", "kd_own", "kd", "kd_all", "all_labels")
TOLD_APART = ("no_kd", "smoothing", "kd", "kd_all", "all_labels")  # in the picture of corruptions


class NoResultsError(ValueError):
    """Raised where a folder has no final run to report on. The message names the folder."""


def write_report(folder: Path, path: Path) -> Path:
    """Write the report on the results in ``folder`` as the HTML page ``path``, and return ``path``.

    Raises:
        NoResultsError: no experiment has a final run there.
        ResultsError: a file there is no file of runs.
    """
    found = summaries(folder)
    if not found:
        raise NoResultsError(f"{folder} holds no finished run: kdfast experiments run --out {folder}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(found, language_rows(folder)), encoding="utf-8")
    return path


def html(found: Sequence[Summary], language: Sequence[LanguageRow] = ()) -> str:
    """The report's HTML, of the experiments in ``found`` and of a language model's students, if there are any."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["p_value"] = _p_value
    template = environment.from_string((files(__package__) / "report.html").read_text("utf-8"))
    return template.render(
        summaries=found,
        claim=next((summary for summary in found if summary.experiment.name == CLAIM), None),
        claim_arms=CLAIM_ARMS,
        accuracy={summary.experiment.name: accuracy_figure(summary) for summary in found},
        robustness={
            summary.experiment.name: robustness_figure(summary, TOLD_APART)
            for summary in found
            if len(summary.tests) > 2  # more than another domain beside the clean test
        },
        language=language,
        verdicts=[row for summary in found for row in _verdicts(summary)],
        about=_about([run for summary in found for run in summary.runs]),
    )


def _verdicts(summary: Summary) -> list[dict[str, Any]]:
    """For each reference, the titles of the arms by verdict."""
    rows = []
    for reference in summary.experiment.references:
        judged = {
            arm.arm.title: arm.comparisons[reference].verdict
            for arm in summary.arms.values()
            if reference in arm.comparisons
        }
        if judged:
            by_verdict = {
                verdict.replace(" ", "_"): [title for title, found in judged.items() if found == verdict]
                for verdict in ("helps", "no evidence", "hurts")
            }
            title = summary.arms[reference].arm.title
            rows.append({"against": f"{summary.experiment.title}: {title}", **by_verdict})
    return rows


def _about(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The versions, machines and commits that the runs were made with."""
    names = [name for name in runs[-1].about if name not in ("seconds", "date")]
    dates = sorted(str(run.about["date"]) for run in runs)
    seconds = sum(float(run.about["seconds"]) for run in runs)
    about = {name: sorted({str(run.about[name]) for run in runs}) for name in names}
    return about | {
        "from, to": [dates[0], dates[-1]],
        "final runs": [f"{len(runs)}, {seconds / 60:.0f} minutes of one core, tuning not counted"],
        "settings": sorted({run.settings for run in runs}),
    }


def _p_value(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0")


# ---- pictures -------------------------------------------------------------------------------------------------------


# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {"helps": "#009E73", "hurts": "#D55E00", "no evidence": "#0072B2", "": "#777777"}


def accuracy_figure(summary: Summary) -> str:
    """Draw each arm's seeds, mean and standard deviation on the clean test, coloured by verdict, as a data URI."""
    arms = list(summary.arms.values())
    figure, axes = _canvas(9.5, 1.4 + 0.27 * len(arms))
    first = next((name for name in summary.experiment.references if name in summary.arms), None)
    for place, arm in enumerate(arms):
        _seeds(axes, arm, place, COLOURS[_verdict(arm, first)])
    if first is not None:
        axes.axvline(100 * summary.arms[first].mean(), color="#777777", ls=":", lw=1)
    axes.set_yticks(range(len(arms)), [arm.arm.title for arm in arms], fontsize=8)
    axes.set_ylim(len(arms) - 0.4, -0.6)  # the first one on top
    axes.set_xlabel("test accuracy, %: each dot a seed, the bar mean ± std")
    axes.grid(axis="x", alpha=0.25)
    if first is not None:
        _legend(figure, f"compared with: {summary.arms[first].arm.title}")
    return _encoded(figure)


def robustness_figure(summary: Summary, names: Sequence[str]) -> str:
    """Draw the accuracy of a few arms under each corruption, as a data URI."""
    arms = [summary.arms[name] for name in names if name in summary.arms]
    figure, axes = _canvas(9.5, 4)
    width = 0.8 / len(arms)
    places = np.arange(len(summary.tests))
    for i, (arm, colour) in enumerate(zip(arms, PALETTE, strict=False)):
        heights = [100 * arm.mean(test) for test in summary.tests]
        spread = [100 * arm.std(test) for test in summary.tests] if len(arm.scores[CLEAN]) > 1 else None
        axes.bar(
            places + i * width,
            heights,
            width,
            yerr=spread,
            color=colour,
            ecolor="#888888",
            label=arm.arm.title,
            capsize=2,
        )
    axes.set_xticks(places + 0.4 - width / 2, summary.tests)
    axes.set_ylabel("test accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.25)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return _encoded(figure)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and leaves pyplot's global state alone
    return figure, figure.add_subplot()


def _seeds(axes: Axes, arm: ArmSummary, place: int, colour: str) -> None:
    values = [100 * value for value in arm.scores[CLEAN].values()]
    axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.35, ms=4, mew=0)
    spread = 100 * arm.std() if len(values) > 1 else None
    axes.errorbar(100 * arm.mean(), place, xerr=spread, fmt="|", color=colour, ms=11, mew=2, capsize=3)


def _verdict(arm: ArmSummary, reference: str | None) -> str:
    found = arm.comparisons.get(reference or "")
    return found.verdict if found else ""


def _legend(figure: Figure, title: str) -> None:
    dots = [
        Line2D([], [], ls="", marker="o", color=colour, label=verdict or "not compared")
        for verdict, colour in COLOURS.items()
    ]
    figure.legend(
        handles=dots, title=title, fontsize=8, title_fontsize=8, loc="outside lower center", ncols=4, frameon=False
    )


def _encoded(figure: Figure) -> str:
    """The figure's PNG as a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
