"""The command ``kdfast``. Its packages are an extra, and so is each command's heavy import."""

from __future__ import annotations

import sys

__all__ = ["main"]

# The extra that brings a package, by import name.
EXTRAS = {
    **dict.fromkeys(("typer", "rich", "sklearn", "torchmetrics", "matplotlib"), "demo"),
    **dict.fromkeys(("mlxtend", "scipy", "jinja2"), "experiments"),
}


def main() -> None:
    """The console script: run the command line, and say what to install if a package of the extra is missing."""
    try:
        from kdfast.cli.app import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        sys.exit(f'kdfast: the package {package} is missing: pip install "kdfast[{EXTRAS[package]}]"')
