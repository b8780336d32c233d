"""The shapes that a capture with ``codec="prototype"`` learns before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from kdfast.cache.capture.batches import Fields
from kdfast.cache.format.storage import open_storage
from kdfast.cache.selection.learn_shapes import learn_shapes
from kdfast.cache.selection.shapes import Shapes

__all__ = ["SHAPES", "can_learn", "shapes_for", "stored_shapes"]

SHAPES = 256
LEARN_ROWS = 65536
ENTRIES = 3  # the codec's own default


def can_learn(loader: Iterable[Any]) -> bool:
    """Whether ``loader`` gives its batches again: learning takes several passes over the first ones."""
    return not isinstance(loader, Iterator)


def shapes_for(
    path: Any,
    model: Callable[..., Any],
    loader: Iterable[Any],
    fields: Fields,
    *,
    vocab_size: int,
    temperature: float,
    options: dict[str, Any],
) -> Shapes:
    """The table for a cache at ``path``: the one that is given, the one that is there, or a new one.

    ``options["shapes"]`` is a table, or how many shapes to learn from the first 65,536 rows. The teacher runs over
    these rows three times more; after that the table is frozen. Several writers of one cache need one table: learn it
    first, with ``learn_shapes``.

    Raises:
        ValueError: a loader that can be iterated only once, or has no row.
    """
    wanted = options.get("shapes", SHAPES)
    if isinstance(wanted, Shapes):
        return wanted
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"shapes must be a table or a positive number, got {wanted!r}")
    found = stored_shapes(path)
    if found is not None:
        return found
    if not can_learn(loader):
        raise ValueError("learning shapes takes several passes over the loader's first batches, and this one has one")
    return learn_shapes(
        lambda: _first_rows(model, loader, fields, vocab_size),
        count=wanted,
        entries=options.get("k", ENTRIES),
        temperature=temperature,
        rounds=1,
    )


def stored_shapes(path: Any) -> Shapes | None:
    """What an earlier session has learned: a capture that goes on must go on with it."""
    storage = open_storage(path)
    try:
        files = storage.list()
    except FileNotFoundError:
        return None
    names = [name for name in files if name.startswith("shapes-") and name.endswith(".safetensors")]
    return Shapes.from_bytes(storage.read_bytes(names[0])) if len(names) == 1 else None


def _first_rows(model: Callable[..., Any], loader: Iterable[Any], fields: Fields, vocab_size: int) -> Iterator[Tensor]:
    rows = 0
    for batch in loader:
        for part in fields.parts(model, batch, fields.keys(batch)):
            logits = part.logits.reshape(-1, part.logits.shape[-1])[: LEARN_ROWS - rows, :vocab_size]
            rows += len(logits)
            yield logits
        if rows >= LEARN_ROWS:
            return
