"""``kdfast bench``: throughput against eager PyTorch and torch.compile."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

app = typer.Typer(help="Throughput benchmarks.", no_args_is_help=True)


@app.callback()
def _bench() -> None:
    """Throughput benchmarks."""


@app.command()
def loss(
    case: Annotated[list[str] | None, typer.Option(help="Cases to run; default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bfloat16, float32; default: both.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="ROWSxCOLUMNS; default: the README's three.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved rounds per case.")] = 11,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and Markdown results.")] = None,
) -> None:
    """CE + divergence, forward + backward: ours, eager PyTorch and torch.compile in one run."""
    from kdfast.bench.loss import CASES, DTYPES, SHAPES, measure
    from kdfast.bench.report import COLUMNS, cells, save

    shapes = [_parse_shape(text) for text in shape] if shape else SHAPES
    plan = [
        (_known(c, CASES), _known(d, DTYPES), *size) for c in case or CASES for d in dtype or DTYPES for size in shapes
    ]
    console = Console()
    results = [measure(*item, repeats) for item in track(plan, "Timing", console=console)]
    table = Table(*COLUMNS)
    for result in results:
        table.add_row(*cells(result))
    console.print(table)
    if out is not None:
        console.print(f"Written to {save(results, out)}")


def _parse_shape(text: str) -> tuple[int, int]:
    try:
        rows, columns = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise typer.BadParameter(f"a shape is ROWSxCOLUMNS, such as 512x32000; got {text!r}") from None
    return rows, columns


def _known(name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(names)}")
    return name
