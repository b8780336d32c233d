"""The plan of a recipe of several trainings: a folder holds the parts of one plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdfast._atomic import publish
from kdfast._description import Description, differences
from kdfast.distill import parallel

__all__ = ["keep_to_plan"]

PLAN = "plan.json"


def keep_to_plan(folder: Path | None, resume: bool, **plan: Any) -> None:
    """Write what a recipe's parts depend on to ``folder``, or compare it with what is there.

    Each part of a recipe begins where the one before it has ended, so a part that is trained longer, or grown in
    another way, would leave those after it as parts of another recipe.

    Args:
        folder: the recipe's; None does nothing.
        resume: False replaces the plan.
        plan: numbers, texts and functions by name.

    Raises:
        ValueError: the folder's parts are of another plan, with all that differs.
    """
    if folder is None:
        return
    path = folder / PLAN
    found = Description()
    for name, value in plan.items():
        found.add(name, value)
    message = None
    if parallel.is_first():
        if resume and path.exists():
            message = _differing(path, found.entries)
        if message is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            publish(path, [json.dumps(found.entries, indent=1).encode()])
    message = parallel.broadcast_object(message)
    if message is not None:
        raise ValueError(message)


def _differing(path: Path, now: dict[str, str]) -> str | None:
    try:
        then = json.loads(path.read_text("utf-8"))
    except ValueError:
        return f"{path} is damaged; resume=False, or another folder, starts over"
    changed = differences(then, now)
    if not changed:
        return None
    texts = (", ".join(f"{name}={pair[side]}" for name, pair in changed.items()) for side in (0, 1))
    return (
        "{} is of a recipe with {}; this one has {}. Its parts build on one another: resume=False, or another folder, "
        "starts over".format(path, *texts)
    )
