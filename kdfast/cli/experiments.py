"""``kdfast demo`` and ``kdfast experiments``: does distillation pay? Measured against controls, on real data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kdfast.cli.terminal import check_choice, exit_on_error, progress_bar

if TYPE_CHECKING:
    from kdfast.demo.experiment import Result
    from kdfast.demo.settings import Settings as DemoSettings
    from kdfast.experiments.catalogue import Experiment
    from kdfast.experiments.settings import Settings

__all__ = ["app", "demo"]

app = typer.Typer(no_args_is_help=True, help="Every recipe against its controls, on real data, with error bars.")

OUT = Path("output/experiments")
QUICK_OUT = Path("output/experiments-quick")
Out = Annotated[Path | None, typer.Option(help=f"Folder of the results. Default: {OUT}, with --quick {QUICK_OUT}.")]
Quick = Annotated[bool, typer.Option("--quick", help="Minutes: three seeds, short training, nothing tuned.")]


def _check_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise typer.BadParameter(f"{device}: {str(error).splitlines()[0]}") from error
    return device


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the cache, the figure and the numbers.")] = Path("output/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs per arm.")] = 8,
    device: Annotated[str, typer.Option(callback=_check_device, help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu",
    temperature: Annotated[float, typer.Option(min=0.01, help="Of student and teacher, in the KD arms.")] = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds: at most 2 seeds, few epochs.")] = False,
    validation: Annotated[
        bool, typer.Option("--validation", help="Score on a part of the training split, as for choosing settings.")
    ] = False,
) -> None:
    """Train a small student on real digits with 60 labels, with and without a teacher, and compare with controls."""
    from kdfast.demo.settings import Settings

    settings = Settings(seeds=seeds, device=device, validation=validation, temperature=temperature)
    with exit_on_error():
        out.mkdir(parents=True, exist_ok=True)
        result = _run_demo(settings.quick() if quick else settings, out)
        _publish(result, out)


def _run_demo(settings: DemoSettings, out: Path) -> Result:
    from kdfast.demo.experiment import Experiment

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        experiment = Experiment(settings, lambda name: progress.advance(bars[name]))
        bars = {name: progress.add_task(title, total=epochs) for name, (title, epochs) in experiment.epochs.items()}
        return experiment.run(out)


def _publish(result: Result, out: Path) -> None:
    from kdfast.demo.plot import plot
    from kdfast.demo.report import notes, tables, write_json

    console = Console()
    for part in (*tables(result), *notes(result)):
        console.print(part, "")
    plot(result, out / "curves.png")
    write_json(result, out / "results.json")
    console.print(f"Written to {out}: curves.png, results.json and the cache {result.cache.name}", soft_wrap=True)


@app.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(metavar="[EXPERIMENT]...", help="Default: all.")] = None,
    out: Out = None,
    quick: Quick = False,
    seeds: Annotated[int, typer.Option(min=1, help="Final runs per arm.")] = 10,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 1,
) -> None:
    """Run what is missing, then write the report. It can be interrupted: the next call resumes."""
    from kdfast.experiments.catalogue import EXPERIMENTS
    from kdfast.experiments.settings import Settings

    chosen = [EXPERIMENTS[check_choice(name, EXPERIMENTS)] for name in names or EXPERIMENTS]
    settings = Settings(seeds=seeds)
    settings = settings.quick() if quick else settings
    folder = out or (QUICK_OUT if quick else OUT)
    with exit_on_error(ValueError):
        for experiment in chosen:
            _run(experiment, settings, folder, jobs)
        _report(folder)


@app.command("list")
def list_(out: Out = None, quick: Quick = False) -> None:
    """List the experiments, their arms, and how many runs of each are done."""
    from kdfast.experiments.catalogue import EXPERIMENTS
    from kdfast.experiments.runner import file_of
    from kdfast.experiments.store import read_runs

    folder = out or (QUICK_OUT if quick else OUT)
    table = Table("experiment", "title", "arms", "runs done")
    with exit_on_error(ValueError):
        for name, experiment in EXPERIMENTS.items():
            done = len(read_runs(file_of(folder, name)))
            table.add_row(name, experiment.title, ", ".join(arm.name for arm in experiment.arms), str(done))
    Console().print(table)


@app.command()
def report(
    out: Out = None,
    quick: Quick = False,
    page: Annotated[Path | None, typer.Option(help="The HTML file. Default: report.html in the folder.")] = None,
) -> None:
    """Write tables, figures and verdicts as one HTML page, from the results so far."""
    with exit_on_error(ValueError):
        _report(out or (QUICK_OUT if quick else OUT), page)


def _run(experiment: Experiment, settings: Settings, folder: Path, jobs: int) -> None:
    from kdfast.experiments.runner import complete, planned

    with progress_bar(experiment.name, planned(experiment, settings)) as advance:
        complete(experiment, settings, folder, jobs=jobs, advance=lambda: advance(1))


def _report(folder: Path, page: Path | None = None) -> None:
    from kdfast.experiments.report import write_report

    path = write_report(folder, page or folder / "report.html")
    Console().print(f"Written to {path}", soft_wrap=True)
