"""The typer app: the commands and ``--version``."""

from __future__ import annotations

from typing import Annotated

import typer

from kdfast import __version__
from kdfast.cli.bench import app as bench_app
from kdfast.cli.cache import app as cache_app
from kdfast.cli.demo import demo
from kdfast.cli.doctor import doctor
from kdfast.cli.experiments import app as experiments_app

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo)
app.command()(doctor)
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
app.add_typer(experiments_app, name="experiments")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kdfast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fused distillation losses, and a compressed cache of the teacher's soft labels."""
