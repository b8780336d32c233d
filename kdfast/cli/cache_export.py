"""``kdfast cache export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import kdfast.cache
from kdfast.cli.failing import failing
from kdfast.cli.progress import bar

__all__ = ["export"]


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The cache's directory.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="The file to write.", show_default=False)],
) -> None:
    """Write the labels as Parquet, one record per row, for tools that know nothing of kdfast."""
    from kdfast.cache.tools.export import export

    with failing(), bar("Records", len(kdfast.cache.open(folder))) as advance:
        records = export(folder, out, progress=advance)
    Console().print(f"{records:,} records written to {out}", soft_wrap=True)
