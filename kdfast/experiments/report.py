"""The report: one HTML page with everything inside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from kdfast.experiments.figures import accuracy_figure, robustness_figure
from kdfast.experiments.language import LanguageRow, language_rows
from kdfast.experiments.runs import Run
from kdfast.experiments.summary import Summary, summaries

__all__ = ["NoResultsError", "html", "write_report"]

CLAIM = "few-labels-digits"
CLAIM_ARMS = ("no_kd", "smoothing", "kd_own", "kd", "kd_all", "all_labels")
TOLD_APART = ("no_kd", "smoothing", "kd", "kd_all", "all_labels")  # in the picture of corruptions


class NoResultsError(ValueError):
    """There is nothing to report on. The message names the folder."""


def write_report(folder: Path, path: Path) -> Path:
    """Report on the results in ``folder``, as the page ``path``.

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
    """The page. ``language``: of SmolLM2's students, if there are any."""
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
    """Per reference, the titles of the arms by verdict."""
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
    """Every version, machine and commit that the runs were made with."""
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
