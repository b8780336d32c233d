"""The command line ``kdfast``. Its packages are optional, and commands import theirs when they run."""

from __future__ import annotations

import sys

__all__ = ["main"]

# The extra that brings a package, by the name that is imported.
EXTRAS = {
    **dict.fromkeys(("typer", "rich", "sklearn", "torchmetrics", "matplotlib"), "demo"),
    **dict.fromkeys(("mlxtend", "scipy", "jinja2"), "experiments"),
}


def main() -> None:
    """Run the command line. If a package of an extra is missing, exit with the command that installs it."""
    try:
        from kdfast.cli.app import app

        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        sys.exit(f'kdfast: the package {package} is missing: pip install "kdfast[{EXTRAS[package]}]"')
