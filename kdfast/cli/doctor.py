"""``kdfast doctor``: what is installed, and which kernels run where."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kdfast
from kdfast._C import cpu_isa
from kdfast.kernels import cluster

__all__ = ["doctor"]

VOCABULARIES = (1000, 32_000, 128_256, 262_144)

# Extra: the distributions it brings. `dev` is for working on kdfast itself.
EXTRAS = {
    "demo": ("scikit-learn", "torchmetrics", "rich", "matplotlib", "typer"),
    "experiments": ("mlxtend", "scipy", "jinja2"),
    "lm": ("transformers", "gguf", "accelerate"),
    "triton": ("triton",),
}


def doctor() -> None:
    """Versions, the instruction set in use, devices, and the optional packages."""
    table = Table(show_header=False)
    for name, value in {**_versions(), **_cpu(), **_accelerators()}.items():
        table.add_row(name, escape(value))
    table.add_section()
    for extra, packages in EXTRAS.items():
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
        **{f"GPU rows of {columns:,}": _plan(columns) for columns in VOCABULARIES},
    }


def _plan(columns: int) -> str:
    """Which kernel takes rows of so many bfloat16 columns, where both kinds are there."""
    sizes = {op: cluster.plan(op, columns, torch.bfloat16) for op in cluster.ROWS_ON_CHIP}
    kernels = {op: f"one read, clusters of {size}" if size else "Triton" for op, size in sizes.items()}
    return ", ".join(f"{op.removesuffix('_rows')}: {kernel}" for op, kernel in kernels.items())


def _installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"[yellow]{package} missing[/]"
