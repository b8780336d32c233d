"""``kdfast demo``: the experiment of ``kdfast.demo``, with progress bars, tables, a figure and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kdfast.cli.failing import failing

if TYPE_CHECKING:
    from kdfast.demo.experiment import Result
    from kdfast.demo.settings import Settings

__all__ = ["demo"]


def _usable(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise typer.BadParameter(f"{device}: {str(error).splitlines()[0]}") from error
    return device


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the cache, the figure and the numbers.")] = Path("output/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs per arm.")] = 8,
    device: Annotated[str, typer.Option(callback=_usable, help="Where to train: cpu, cuda, cuda:1, ...")] = "cpu",
    temperature: Annotated[float, typer.Option(min=0.01, help="Of student and teacher, for the KD arms.")] = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds: at most 2 seeds, few epochs.")] = False,
    validation: Annotated[
        bool, typer.Option("--validation", help="Score on a part of the training split: for choosing settings.")
    ] = False,
) -> None:
    """Train a small student of real digits with 60 labels: does distillation pay, and against which controls?"""
    from kdfast.demo.settings import Settings

    settings = Settings(seeds=seeds, device=device, validation=validation, temperature=temperature)
    with failing():
        out.mkdir(parents=True, exist_ok=True)
        result = _run(settings.quick() if quick else settings, out)
        _publish(result, out)


def _run(settings: Settings, out: Path) -> Result:
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
