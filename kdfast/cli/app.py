"""The typer app: ``--version``, ``kdfast doctor`` on what is installed, and the groups of commands."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kdfast
from kdfast._C import cpu_isa
from kdfast.cli.bench import app as bench_app
from kdfast.cli.cache import app as cache_app
from kdfast.cli.experiments import app as experiments_app
from kdfast.cli.experiments import demo
from kdfast.cli.kld import kld
from kdfast.kernels import cluster

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(demo)
app.command()(kld)
app.add_typer(bench_app, name="bench")
app.add_typer(cache_app, name="cache")
app.add_typer(experiments_app, name="experiments")

VOCABULARIES = (1000, 32_000, 128_256, 262_144)

# The distributions of each extra. `dev` is for working on kdfast itself.
DISTRIBUTIONS = {
    "demo": ("scikit-learn", "torchmetrics", "rich", "matplotlib", "typer"),
    "experiments": ("mlxtend", "scipy", "jinja2"),
    "lm": ("transformers", "gguf", "accelerate"),
    "convert": ("pyarrow", "zstandard", "pyyaml"),
    "vllm": ("requests",),
    "ray": ("ray",),
    "triton": ("triton",),
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kdfast {kdfast.__version__}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fused distillation losses, and a compressed cache of the teacher's soft labels."""


@app.command()
def doctor() -> None:
    """Print versions, the instruction set in use, devices, and the optional packages."""
    table = Table(show_header=False)
    for name, value in {**_versions(), **_cpu(), **_accelerators()}.items():
        table.add_row(name, escape(value))
    table.add_section()
    for extra, packages in DISTRIBUTIONS.items():
        table.add_row(escape(f"kdfast[{extra}]"), ", ".join(map(_installed, packages)))
    Console().print(table)


def _versions() -> dict[str, str]:
    return {
        "kdfast": kdfast.__version__,
        "torch": str(torch.__version__),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }


def _cpu() -> dict[str, str]:
    return {"CPU kernels": f"{cpu_isa()}, {torch.get_num_threads()} threads"}


def _accelerators() -> dict[str, str]:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "not available"
    built = "built" if cluster.is_built() else "none in this build"
    return {
        "CUDA": f"{cuda}" + (f", torch built for {torch.version.cuda}" if torch.version.cuda else ""),
        "one-read CUDA kernels": f"{built}; for compute capability 9.0, 10.0 and 10.3",
        "Triton kernels": "importable" if find_spec("triton") else "not installed: GPUs run the PyTorch reference",
        **{f"GPU rows of {columns:,}": _kernels_for(columns) for columns in VOCABULARIES},
    }


def _kernels_for(columns: int) -> str:
    """The kernel that each op runs for rows of ``columns`` bfloat16 values, if both kinds are there."""
    sizes = {op: cluster.plan(op, columns, torch.bfloat16) for op in cluster.ROWS_ON_CHIP}
    kernels = {op: f"one read, clusters of {size}" if size else "Triton" for op, size in sizes.items()}
    return ", ".join(f"{op.removesuffix('_rows')}: {kernel}" for op, kernel in kernels.items())


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"[yellow]{package} missing[/]"
