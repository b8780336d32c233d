"""The command ``kdfast``. Its packages are an extra, and so is each command's heavy import."""

from __future__ import annotations

import sys

__all__ = ["main"]

# What `pip install "kdfast[demo]"` brings, by import name.
EXTRA = ("typer", "rich", "sklearn", "torchmetrics", "matplotlib")


def main() -> None:
    """The console script: run the command line, and say what to install if a package of the extra is missing."""
    try:
        from kdfast.cli.app import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(f'kdfast: the package {package} is missing: pip install "kdfast[demo]"')
